"""Annotators of all kinds, and how the scores of their views and classes are combined."""
