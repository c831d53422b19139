"""tlvit: vision transformers trained with token labels, in JAX/Flax."""

from tlvit.models import create_model, list_models
from tlvit.version import __version__

__all__ = ["__version__", "create_model", "list_models"]
