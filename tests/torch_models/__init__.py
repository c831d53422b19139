"""PyTorch models with the official names, written for these tests. They check exported checkpoints."""
