"""tlvit: vision transformers trained with token labels, in JAX/Flax.

Everything public is an attribute of this package and is imported at its first use, so `import tlvit` needs
JAX and Flax only. Files are opened by `load`; models are built by `create_model`; `functionalize` turns a
model into a pure function for `jax.jit`.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from tlvit import config as config
from tlvit.version import __version__

# Name -> the file that defines it.
_PUBLIC = {
    # models
    "create_model": "tlvit.models.table",
    "list_models": "tlvit.models.table",
    "functionalize": "tlvit.models.functional",
    "Net": "tlvit.models.functional",
    # types
    "Batch": "tlvit.types",
    "ScoreMaps": "tlvit.types",
    "TokenTargets": "tlvit.types",
    "ModelOutput": "tlvit.types",
    "SegmentationOutput": "tlvit.types",
    "MixTokenMask": "tlvit.types",
    "check_batch": "tlvit.ops.check_batch",
    "Config": "tlvit.config",
    # targets, mixing and losses
    "make_targets": "tlvit.ops.targets",
    "token_label_loss": "tlvit.ops.losses",
    "distillation_loss": "tlvit.ops.losses",
    "draw_mixtoken_mask": "tlvit.ops.mixing",
    "mixtoken_mask_from_box": "tlvit.ops.mixing",
    "mix_tokens": "tlvit.ops.mixing",
    "resize_pos_embed": "tlvit.ops.resize",
    # segmentation
    "segmentation_loss": "tlvit.ops.segmentation",
    "slide_logits": "tlvit.ops.segmentation",
    "multi_scale_probs": "tlvit.ops.segmentation",
    "confusion_matrix": "tlvit.ops.segmentation",
    "iou_summary": "tlvit.ops.segmentation",
    # checkpoints
    "load": "tlvit.checkpoints.load",
    "export": "tlvit.checkpoints.torch_files",
    "from_torch": "tlvit.checkpoints.torch_names",
    "to_torch": "tlvit.checkpoints.torch_names",
    "LoadReport": "tlvit.checkpoints.torch_names",
    "ModelInfo": "tlvit.checkpoints.model_info",
    # data
    "open_source": "tlvit.data.sources.open",
    "open_score_maps": "tlvit.data.score_maps.reader",
    "ScoreMapWriter": "tlvit.data.score_maps.writer",
    "MapDescription": "tlvit.data.score_maps.format",
    # training and inference
    "make_optimizer": "tlvit.training.optimizer",
    "Annotator": "tlvit.training.device_scorer",
    "annotate": "tlvit.training.annotation",
    "DenseAnnotator": "tlvit.annotators.dense",
    "Scoring": "tlvit.annotators.scoring",
    "predict": "tlvit.predict",
    "segment": "tlvit.segment",
}

__all__ = ["__version__", "config", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tlvit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The type of this package. It keeps functions such as `predict` apart from the submodules they are in.

    The import system binds an imported submodule to its name in the package. The submodules tlvit.annotate
    and tlvit.predict are commands, but the package's attributes of these names are functions.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
