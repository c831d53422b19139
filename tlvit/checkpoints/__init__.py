"""Checkpoints: tlvit's own folders (Orbax) and PyTorch files, in and out."""
