"""Pure functions on arrays: targets, mixing, losses, augmentation on the device."""
