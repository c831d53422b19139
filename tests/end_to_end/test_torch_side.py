"""Exported models load strictly in PyTorch and give the same logits, and the other way round."""

import numpy as np
import pytest
import safetensors.numpy
from conftest import fill, fill_model, golden_images

import tlvit
from tlvit.checkpoints import torch_files
from tlvit.checkpoints.torch_names import from_torch, to_torch

torch = pytest.importorskip("torch")

from torch_models.deit import DeiT  # noqa: E402
from torch_models.lvvit import LVViT  # noqa: E402
from torch_models.t2t_vit import T2TViT  # noqa: E402
from torch_models.upernet import UperNet  # noqa: E402

SMALL = {"num_classes": 7, "image_size": (64, 48)}
GRID = {"classes": 7, "grid": (4, 3)}
BLOCKS = (0, 1, 2, 2)
PAIRS = {
    "lvvit": (
        lambda: tlvit.create_model("lvvit_m", dim=48, depth=3, num_heads=4, stem_width=16, **SMALL),
        lambda: LVViT(width=48, depth=3, heads=4, stem=16, residual=2.0, **GRID),
    ),
    "deit": (
        lambda: tlvit.create_model("deit_tiny_patch16_224", dim=48, depth=2, num_heads=3, **SMALL),
        lambda: DeiT(width=48, depth=2, heads=3, distilled=False, **GRID),
    ),
    "deit_distilled": (
        lambda: tlvit.create_model("deit_tiny_distilled_patch16_224", dim=48, depth=2, num_heads=3, **SMALL),
        lambda: DeiT(width=48, depth=2, heads=3, distilled=True, **GRID),
    ),
    "t2t_performer": (
        lambda: tlvit.create_model("t2t_vit_7", dim=48, depth=2, num_heads=4, **SMALL),
        lambda: T2TViT(width=48, depth=2, heads=4, ratio=2, tokens="performer", **GRID),
    ),
    "t2t_transformer": (
        lambda: tlvit.create_model("t2t_vit_t_14", dim=48, depth=2, num_heads=4, **SMALL),
        lambda: T2TViT(width=48, depth=2, heads=4, ratio=3, tokens="transformer", **GRID),
    ),
    "upernet": (
        lambda: tlvit.create_model(
            "upernet_lvvit_l", dim=48, depth=3, num_heads=4, stem_width=16, out_indices=BLOCKS, channels=16,
            **SMALL,
        ),
        lambda: UperNet(
            width=48, depth=3, heads=4, stem=16, residual=1.0, blocks=BLOCKS, channels=16, **GRID
        ),
    ),
    "fcn": (
        lambda: tlvit.create_model(
            "upernet_lvvit_m", dim=48, depth=3, num_heads=4, stem_width=16, out_indices=BLOCKS, channels=16,
            head="fcn", **SMALL,
        ),
        lambda: UperNet(
            width=48, depth=3, heads=4, stem=16, residual=2.0, blocks=BLOCKS, channels=16, head="fcn", **GRID
        ),
    ),
}  # fmt: skip
QUICK = ("lvvit", "deit_distilled")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PAIRS]


def images(seed):
    """The same random images as NHWC and NCHW."""
    pixels = golden_images(seed, 3, 64)[:, :, :48]
    return pixels, torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def torch_logits(model, pixels):
    with torch.inference_mode():
        return model.eval()(pixels).numpy()


def check_close(found, wanted):
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", NAMES)
def test_exported_files_run_in_torch(name, ending, tmp_path):
    ours, theirs = (make() for make in PAIRS[name])
    fill_model(ours)
    path = tmp_path / f"x{ending}"
    torch_files.export(ours, path)
    if ending == ".pth":
        tensors = torch.load(path, weights_only=True)
    else:
        tensors = {k: torch.from_numpy(v.copy()) for k, v in safetensors.numpy.load_file(path).items()}
    theirs.load_state_dict(tensors, strict=True)
    nhwc, nchw = images(0)
    check_close(torch_logits(theirs, nchw), np.asarray(ours(nhwc).logits))


@pytest.mark.parametrize("name", NAMES)
def test_torch_weights_run_in_tlvit(name, tmp_path):
    ours, theirs = (make() for make in PAIRS[name])
    with torch.no_grad():
        for key, tensor in theirs.state_dict().items():  # views: buffers and frozen tables are filled too
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(fill(f"other.{key}", tuple(tensor.shape))))
    wrapped = {f"module.{k}": v for k, v in theirs.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 310}, tmp_path / "model_best.pth.tar")
    report = from_torch(ours, torch_files.read_weights(tmp_path / "model_best.pth.tar").tensors)
    assert (report.reinitialized, report.unexpected, report.resized) == ((), (), ())
    nhwc, nchw = images(1)
    check_close(np.asarray(ours(nhwc).logits), torch_logits(theirs, nchw))


def test_running_statistics_of_torch_are_loaded(tmp_path):
    """A training step in PyTorch changes the running statistics, and with them the logits of tlvit."""
    ours, theirs = (make() for make in PAIRS["lvvit"])
    fill_model(ours)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in to_torch(ours).items()}, strict=True)
    nhwc, nchw = images(2)
    before = np.asarray(ours(nhwc).logits)
    theirs.train()(nchw)  # moves the running statistics, and num_batches_tracked
    from_torch(ours, theirs.state_dict())
    after = np.asarray(ours(nhwc).logits)
    assert np.abs(after - before).max() > 1e-3
    check_close(after, torch_logits(theirs, nchw))
