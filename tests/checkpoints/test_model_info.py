"""tlvit.restore: model folders and workdirs become models again."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import tlvit
from tlvit.checkpoints.load import restore, save_folder
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing, default_preprocessing, image_size_pair
from tlvit.checkpoints.torch_names import to_torch
from tlvit.models.functional import functionalize

TINY = {"dim": 24, "depth": 2, "num_heads": 2, "stem_width": 8}
INFO = ModelInfo(
    "lvvit_m", 3, (64, 32), TINY, class_names=("a", "b", "c"), preprocessing=Preprocessing(crop_pct=0.7)
)


def test_model_folder_there_and_back(tmp_path):
    model = INFO.build(seed=7)
    save_folder(tmp_path / "m", model, INFO)
    again, info = tlvit.load(tmp_path / "m")
    assert info == INFO
    images = np.random.RandomState(0).standard_normal((2, 64, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(again(images).logits, model(images).logits)
    with pytest.raises(ValueError, match="exists already"):
        save_folder(tmp_path / "m", model, INFO)
    with pytest.raises(ValueError, match="holds a lvvit_m, not a lvvit_s"):
        tlvit.load(tmp_path / "m", model="lvvit_s")


def test_folder_at_another_size(tmp_path):
    save_folder(tmp_path / "m", INFO.build(), INFO)
    model, info = tlvit.load(tmp_path / "m", image_size=(32, 96))
    assert (model.grid, info.image_size) == ((2, 6), (32, 96))
    assert info.class_names == INFO.class_names
    assert model(np.zeros((1, 32, 96, 3), np.float32)).logits.shape == (1, 3)


def test_a_folder_that_lies_is_refused(tmp_path):
    from tlvit.checkpoints import native as checkpoints

    _, params, stats = functionalize(INFO.build())
    record = {**INFO.to_json(), "num_classes": 4, "class_names": None}
    checkpoints.save_model(tmp_path / "m", params, stats, record)
    with pytest.raises(
        ValueError, match=r"does not hold a lvvit_m as it says:\n.*head.bias: is \(3,\), wanted \(4,\)"
    ):
        restore(tmp_path / "m")
    with pytest.raises(ValueError, match="does not say its image_size"):
        ModelInfo.from_json({"model": "lvvit_m", "num_classes": 4})


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is no tlvit model folder"):
        tlvit.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no checkpoint"):
        tlvit.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        tlvit.load(tmp_path / "nothing")


@pytest.mark.parametrize(("ema", "factor"), [(None, 2), (True, 2), (False, 1)])
def test_workdir_gives_averaged_or_raw_weights(tmp_path, monkeypatch, ema, factor):
    from tlvit.checkpoints import native as checkpoints

    model = INFO.build()
    _, params, stats = functionalize(model)
    asked = []

    def read(workdir, *, ema):  # the reading itself is tested with the checkpoints
        asked.append(ema)
        return (
            jax.tree.map(lambda x: x * (2 if ema else 1), params),
            stats,
            {"info": INFO.to_json(), "step": 3},
        )

    monkeypatch.setattr(checkpoints, "restore_for_inference", read)
    (tmp_path / "checkpoints").mkdir()
    again, info = restore(tmp_path, ema=ema)
    assert asked == [ema is not False]
    assert info == INFO
    np.testing.assert_array_equal(to_torch(again)["norm.weight"], to_torch(model)["norm.weight"] * factor)


def test_info_survives_json():
    import json

    assert ModelInfo.from_json(json.loads(json.dumps(INFO.to_json()))) == INFO
    short = ModelInfo.from_json({"model": "lvvit_m", "num_classes": 2, "image_size": 224})
    assert (short.image_size, short.preprocessing.crop_pct, short.class_names) == ((224, 224), 1.0, None)
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        ModelInfo("lvvit_m", 3, (64, 64), class_names=("a", "b"))


def test_published_preprocessing():
    crops = {
        n: default_preprocessing(n).crop_pct
        for n in ("lvvit_t", "lvvit_s", "lvvit_m", "lvvit_l", "t2t_vit_7")
    }
    assert crops == {"lvvit_t": 0.9, "lvvit_s": 0.9, "lvvit_m": 1.0, "lvvit_l": 1.0, "t2t_vit_7": 0.9}
    assert default_preprocessing("deit_tiny_patch16_224").crop_pct == 0.875
    assert default_preprocessing("dm_nfnet_f6").crop_pct == 0.956


@pytest.mark.parametrize(
    ("size", "pair"),
    [(224, (224, 224)), ("96", (96, 96)), ("64x32", (64, 32)), ([4, 8], (4, 8)), ((48,), (48, 48))],
)
def test_image_sizes(size, pair):
    assert image_size_pair(size) == pair


@pytest.mark.parametrize("size", ["", "axb", "1x2x3", 0, [-1, 4], (), (1, 2, 3)])
def test_image_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="A size is one number or HEIGHTxWIDTH"):
        image_size_pair(size)


def test_importing_tlvit_loads_nothing_heavy():
    code = (
        "import sys, tlvit;"
        "heavy = {'torch', 'tensorflow', 'orbax', 'matplotlib', 'PIL', 'safetensors'} & set(sys.modules);"
        "assert not heavy, heavy; assert callable(tlvit.load);"
        "heavy = {'torch', 'tensorflow', 'matplotlib'} & set(sys.modules); assert not heavy, heavy;"
        "import tlvit.checkpoints.load; assert callable(tlvit.load)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
