"""Checkpoints: tlvit's own (Orbax), PyTorch's files, and the names that both have in common."""
