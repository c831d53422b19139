"""Small PyTorch models with the official names, written for these tests: a second opinion on exports."""
