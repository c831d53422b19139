"""Sentences from the error messages of libraries."""

import re


def tensorflow_sentence(message: str) -> str:
    """The first line of an error message of TensorFlow without the names of graph nodes and operations."""
    line = re.sub(r"\{\{[^}]*\}\} ?", "", message).partition("\n")[0]
    return re.sub(r" ?\[Op:\w*\].*", "", line)


def brief(error: BaseException) -> str:
    """The first line of an error's message, with the kind of the error where that says something."""
    line = str(error).partition("\n")[0][:300]
    return line if isinstance(error, ValueError) and line else f"{type(error).__name__}: {line}"
