"""tlvit: vision transformers trained with token labels, in JAX/Flax."""

from typing import Any

from tlvit.models.table import create_model, list_models
from tlvit.version import __version__

__all__ = ["__version__", "create_model", "list_models", "load"]


def __getattr__(name: str) -> Any:
    """`tlvit.load` is imported at its first use: opening files takes libraries that models do not."""
    if name == "load":
        from tlvit.checkpoints.load import load

        return load
    raise AttributeError(f"module 'tlvit' has no attribute {name!r}")
