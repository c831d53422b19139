"""The flat public API: every name is there, lazy and documented, and functions win over commands."""

import importlib
import inspect
import subprocess
import sys

import pytest
from conftest import ROOT

import tlvit

# The names that other code relies on, from the design.
PROMISED = {
    "create_model", "list_models", "load", "export", "from_torch", "to_torch", "functionalize",
    "make_targets",
    "token_label_loss", "distillation_loss", "draw_mixtoken_mask", "mixtoken_mask_from_box", "mix_tokens",
    "make_optimizer", "resize_pos_embed", "annotate", "ScoreMapWriter", "open_score_maps", "open_source",
    "predict", "check_batch", "Batch", "ScoreMaps", "TokenTargets", "ModelOutput", "MixTokenMask", "Config",
    "SegmentationOutput", "segmentation_loss", "slide_logits", "multi_scale_probs", "confusion_matrix",
    "iou_summary", "segment", "DenseAnnotator", "Scoring",
}  # fmt: skip


def test_all_promised_names_are_there():
    assert PROMISED <= set(tlvit.__all__) <= set(dir(tlvit))
    for name in tlvit.__all__:
        assert getattr(tlvit, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        tlvit.nonsense  # noqa: B018


@pytest.mark.parametrize("name", [n for n in tlvit.__all__ if n not in ("__version__", "config")])
def test_every_public_name_is_documented_and_typed(name):
    value = getattr(tlvit, name)
    assert len(inspect.getdoc(value)) > 40
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
        assert untyped == []
        assert signature.return_annotation is not signature.empty
        assert len(signature.parameters) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["annotate", "predict"])
def test_functions_win_over_the_commands_of_the_same_name(name):
    """Whichever is imported first."""
    code = (
        f"import tlvit.{name}, tlvit; assert callable(tlvit.{name}); from tlvit.{name} import main; print(1)"
    )
    for order in (code, f"import tlvit; tlvit.{name}; " + code):
        done = subprocess.run([sys.executable, "-c", order], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == "1\n", done.stderr
    assert callable(importlib.import_module(f"tlvit.{name}").main)


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, tlvit; heavy = ['tensorflow', 'tensorflow_datasets', 'clu', 'ml_collections', 'torch', "
        "'orbax']; print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
