"""tlvit.segment and `tlvit predict` with a segmentation model."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randn
from flax import nnx
from PIL import Image

from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.native import save_model_folder
from tlvit.ops.normalize import normalize
from tlvit.predict import main
from tlvit.segment import segment, segment_files
from tlvit.types import SegmentationOutput

RULE = Preprocessing(crop_pct=1.0, scale=(48, 32), window=0, stride=0)
INFO = ModelInfo(
    model="upernet",
    num_classes=3,
    image_size=(32, 32),
    class_names=("sky", "sea", "sand"),
    preprocessing=RULE,
    options={"dim": 16, "depth": 1, "num_heads": 2, "channels": 8, "out_indices": (0, 0, 0, 0)},
)


class PixelClassifier(nnx.Module):
    """A linear classifier of single pixels."""

    task = "segmentation"

    def __init__(self):
        self.kernel = nnx.Param(jnp.asarray(randn(3, 3)))

    def __call__(self, images, *, key=None):
        return SegmentationOutput(logits=images @ self.kernel[...])


@pytest.fixture(scope="module")
def model():
    return INFO.build(seed=1)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "beach.png"
    pixels = np.random.RandomState(0).randint(0, 256, (32, 48, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(("window", "stride", "multi_scale"), [(0, 0, False), (20, 12, False), (0, 0, True)])
def test_the_classes_are_those_of_the_largest_probabilities(window, stride, multi_scale, photo):
    """In windows and as a whole the same, because every pixel is classified by itself."""
    rule = dataclasses.replace(RULE, window=window, stride=stride)
    info = dataclasses.replace(INFO, preprocessing=rule)
    [found] = segment(PixelClassifier(), info, [photo], multi_scale=multi_scale)
    pixels = normalize(np.asarray(found.image)[None], rule.mean, rule.std)
    expected = (np.asarray(pixels) @ randn(3, 3)).argmax(-1)[0]
    assert found.error is None
    assert found.classes.shape == (32, 48)
    same = np.mean(found.classes == expected)
    assert 0.4 < same < 0.99 if multi_scale else same > 0.999  # several sizes blur the pixels


def test_a_folder_gets_maps_overlays_and_one_legend(model, photo, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    status = segment_files(model, INFO, [photo, tmp_path / "broken.png"], tmp_path / "out", as_json=True)
    names = {"0001_beach_classes.png", "0001_beach_overlay.png", "legend.png"}
    assert (status, {path.name for path in (tmp_path / "out").iterdir()}) == (0, names)
    first, second = json.loads(capsys.readouterr().out)
    classes = np.asarray(Image.open(tmp_path / "out" / "0001_beach_classes.png"))
    for item in first["found"]:
        assert item["fraction"] == pytest.approx(np.mean(classes == item["class"]))
        assert item["name"] == INFO.class_names[item["class"]]
    assert sum(item["fraction"] for item in first["found"]) == pytest.approx(1)
    assert "broken.png" in second["image"]
    assert second["error"]


def test_classifiers_are_refused(photo):
    info = dataclasses.replace(INFO, model="vit", options={"dim": 16, "depth": 1, "num_heads": 2})
    with pytest.raises(ValueError, match="needs a segmentation model; vit is a classifier"):
        segment(info.build(), info, [photo])


def test_views_of_classifiers_are_refused(model, photo, tmp_path, capsys):
    save_model_folder(tmp_path / "model", model, INFO)
    flags = [f"--checkpoint={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", "--tta=flip"]
    assert main([*flags, str(photo)]) == 1
    assert "--tta is for classifiers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
