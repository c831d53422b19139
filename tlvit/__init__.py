"""tlvit: vision transformers trained with token labels, in JAX/Flax."""

import importlib
import sys
from types import ModuleType
from typing import Any

from tlvit.models.table import create_model, list_models
from tlvit.version import __version__

# Imported at their first use: these files need libraries that models do not need.
_LAZY = {
    "Annotator": "tlvit.training.annotation",
    "MapDescription": "tlvit.data.score_maps.format",
    "ScoreMapWriter": "tlvit.data.score_maps.writer",
    "annotate": "tlvit.training.annotation",
    "load": "tlvit.checkpoints.load",
    "open_score_maps": "tlvit.data.score_maps.reader",
    "open_source": "tlvit.data.sources.open",
    "predict": "tlvit.predict",
}

__all__ = ["__version__", "create_model", "list_models", *_LAZY]


def __getattr__(name: str) -> Any:
    """Imports a name of `_LAZY` at its first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'tlvit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """The type of this package. It keeps the functions `annotate` and `predict` apart from their commands.

    The import system binds an imported submodule to its name in the package. The submodules tlvit.annotate
    and tlvit.predict are commands, and the package's attributes of these names are functions.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
