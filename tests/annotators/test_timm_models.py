"""Tests of models of timm as annotators: with a stand-in, and with timm itself where it can be imported."""

import importlib
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")  # the stand-in is a model of PyTorch

import timm_stand_in  # noqa: E402

from tlvit.annotators import timm_models  # noqa: E402
from tlvit.annotators.dense import DenseAnnotator  # noqa: E402
from tlvit.annotators.timm_models import TimmAnnotator  # noqa: E402


@pytest.fixture(scope="session")
def real_timm():
    """timm itself.

    A torchvision for CUDA cannot load its compiled operators beside the CPU build of PyTorch, and its import
    fails because two of them are not declared. Models of timm call neither: they are declared here, without
    an implementation.
    """
    try:
        return pytest.importorskip("timm")
    except RuntimeError:  # operator torchvision::nms does not exist
        for module in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
            del sys.modules[module]
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
        return importlib.import_module("timm")


@pytest.fixture
def tiny_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", timm_stand_in.module())


def pixels(*size, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (2, *size, 3)).astype(np.uint8)


def normalized(images, preprocessing):
    """[B, 3, H, W], computed here."""
    x = (images / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    return torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))


def save(folder, name, num_classes):
    """Weights of a new model in a file."""
    torch.manual_seed(5)
    model = timm_stand_in.MODELS[name][0](num_classes)
    torch.save({"state_dict": model.state_dict()}, folder / "w.pth")
    return model.eval(), folder / "w.pth"


@pytest.mark.parametrize("name", ["tiny_conv", "tiny_swin"])
def test_the_cells_of_a_convolutional_network_average_to_its_logits(name, tiny_timm, tmp_path):
    model, file = save(tmp_path, name, 4)
    annotator = TimmAnnotator(name, file, image_size=(32, 48))
    assert isinstance(annotator, DenseAnnotator)
    assert (annotator.num_classes, annotator.image_size, annotator.crop_pct) == (4, (32, 48), 0.8)
    assert annotator.preprocessing.mean == (0.2, 0.3, 0.4)
    dense = annotator.dense_logits(pixels(32, 48))
    assert dense.shape == (2, 4, 6, 4)
    expected = model(normalized(pixels(32, 48), annotator.preprocessing)).detach()
    np.testing.assert_allclose(dense.mean((1, 2)), expected, atol=1e-5)


def test_every_patch_token_gets_the_classifiers_of_the_prefix_tokens(tiny_timm, tmp_path):
    model, file = save(tmp_path, "tiny_vit", 5)
    annotator = TimmAnnotator("tiny_vit", file)
    dense = annotator.dense_logits(pixels(32, 32))
    tokens = model.forward_features(normalized(pixels(32, 32), annotator.preprocessing))[:, 2:]
    expected = (model.head(tokens) + model.head_dist(tokens)).detach() / 2
    np.testing.assert_allclose(dense.reshape(2, 16, 5), expected, atol=1e-5)


def test_transformers_are_built_for_other_image_sizes(tiny_timm, tmp_path):
    _, file = save(tmp_path, "tiny_vit", 5)
    assert TimmAnnotator("tiny_vit", file, (16, 40)).dense_logits(pixels(16, 40)).shape == (2, 2, 5, 5)


def test_the_version_is_a_hash_of_the_weights(tiny_timm, tmp_path):
    _, file = save(tmp_path, "tiny_conv", 4)
    first = TimmAnnotator("tiny_conv", file)
    assert first.version == TimmAnnotator("tiny_conv.a1_in1k", file).version
    state = torch.load(file)["state_dict"]
    state["fc.bias"][0] += 1
    torch.save(state, file)
    assert first.version != TimmAnnotator("tiny_conv", file).version
    assert (first.geometry, TimmAnnotator("tiny_conv", file, (32, 48)).geometry) == ("center", "full")


def test_token_grids(tiny_timm, tmp_path):
    """Where the model does not say its grid, it is the one of the image's aspect ratio."""
    _, file = save(tmp_path, "tiny_vit", 5)
    annotator = TimmAnnotator("tiny_vit", file)
    annotator._model.patch_embed.grid_size = None
    assert annotator._token_grid(18) == (4, 4)
    with pytest.raises(ValueError, match="has 17 tokens for an image, in no grid that is known"):
        annotator._token_grid(17)
    annotator._model.forward_features = lambda x: [x]
    with pytest.raises(ValueError, match="features of shape list"):
        annotator.dense_logits(pixels(32, 32))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_con", "timm has no model 'tiny_con'; did you mean tiny_conv"),
        ("zzz", r"timm has no model 'zzz'; timm\.list_models\(\) lists them\."),
        ("tiny_conv.b2", r"no weights 'tiny_conv\.b2'; it has tiny_conv\.a1_in1k, tiny_conv\.a2_in1k\."),
        ("tiny_conv", "OSError: We couldn't connect to .* give the file: timm:tiny_conv:FILE"),
    ],
)
def test_names_and_weights_that_do_not_exist(name, message, tiny_timm):
    with pytest.raises(ValueError, match=message):
        TimmAnnotator(name)


def test_weights_that_do_not_fit(tiny_timm, tmp_path):
    _, file = save(tmp_path, "tiny_conv", 4)
    with pytest.raises(ValueError, match=r"w\.pth has no tensor head\.weight, the classifier of the model"):
        TimmAnnotator("tiny_vit", file)
    torch.save({"fc.weight": torch.zeros(4, 10)}, file)
    with pytest.raises(ValueError, match=r"w\.pth does not fit timm's tiny_conv: Missing key"):
        TimmAnnotator("tiny_conv", file)
    with pytest.raises(FileNotFoundError):
        TimmAnnotator("tiny_conv", tmp_path / "none.pth")


def test_a_torchvision_of_another_build(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(
        ImportError, match=r"nms does not exist\. torch and torchvision are of different builds"
    ):
        timm_models._import_timm()


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install tlvit\[timm\]"):
        timm_models._import_timm()


# timm itself

LINEAR = ["resnet18", "dm_nfnet_f0", "regnety_002", "densenet121", "convmixer_768_32", "hrnet_w18_small"]
OTHERS = ["convnext_atto", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"]
VITS = ["test_vit", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "cait_xxs24_224"]


def check_model(timm, name, folder):
    """Compares an annotator with its model: the mean of the cells, or the classifier of the patch tokens."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=7).eval()
    torch.save(model.state_dict(), folder / "w.pth")
    annotator = TimmAnnotator(name, folder / "w.pth")
    assert (annotator.num_classes, annotator.class_names) == (7, None)
    images = pixels(*annotator.image_size)[:1]
    dense = annotator.dense_logits(images)
    assert dense.shape[0] == 1
    assert min(dense.shape[1:3]) > 1
    x = normalized(images, annotator.preprocessing)
    with torch.no_grad():
        if name in [*LINEAR, "test_resnet"]:
            np.testing.assert_allclose(dense.mean((1, 2)), model(x), rtol=1e-3, atol=1e-4)
        elif name in VITS:
            tokens = model.forward_features(x)[:, model.num_prefix_tokens :]
            logits = model.head(tokens)
            if hasattr(model, "head_dist"):
                logits = (logits + model.head_dist(tokens)) / 2
            np.testing.assert_allclose(dense.reshape(1, -1, 7), logits, rtol=1e-3, atol=1e-4)


def test_the_smallest_model_of_timm(real_timm, tmp_path):
    check_model(real_timm, "test_resnet", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEAR + OTHERS + VITS)
def test_models_of_timm(name, real_timm, tmp_path):
    check_model(real_timm, name, tmp_path)


@pytest.mark.slow
def test_timm_resizes_positions_and_names_the_classes_of_imagenet(real_timm, tmp_path):
    model = real_timm.create_model("vit_tiny_patch16_224", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    annotator = TimmAnnotator("vit_tiny_patch16_224", tmp_path / "w.pth", (192, 256))
    assert annotator.dense_logits(pixels(192, 256)[:1]).shape == (1, 12, 16, 1000)
    assert annotator.class_names[0] == "n01440764"
    with pytest.raises(ValueError, match="timm has no model 'resnet180'; did you mean resnet18"):
        TimmAnnotator("resnet180")
    with pytest.raises(ValueError, match=r"timm has no weights 'resnet18\.x1'; it has .*resnet18\.a1_in1k"):
        TimmAnnotator("resnet18.x1")
