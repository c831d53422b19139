"""The training step, the loop and what they need: mesh, prefetch, optimizer, state, evaluation, run log."""
