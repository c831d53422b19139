"""The recipes. The wheel installs this folder as tlvit.configs."""
