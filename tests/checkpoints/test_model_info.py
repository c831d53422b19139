"""ModelInfo: JSON of this version and of version 0.1, published preprocessing, inference rule."""

import json

import pytest

from tlvit.checkpoints.model_info import ModelInfo, Preprocessing, published_preprocessing
from tlvit.config import parse_image_size
from tlvit.ops.normalize import IMAGENET_MEAN, IMAGENET_STD

TINY = {"dim": 24, "depth": 2, "num_heads": 2, "stem_width": 8}
INFO = ModelInfo(
    "lvvit_m",
    3,
    (64, 32),
    TINY,
    class_names=("a", "b", "c"),
    preprocessing=Preprocessing(crop_pct=0.7, interpolation="bilinear"),
    best_weights="raw",
)


def test_json_round_trip():
    record = json.loads(json.dumps(INFO.to_json()))
    assert ModelInfo.from_json(record) == INFO
    assert record == {
        "model": "lvvit_m",
        "num_classes": 3,
        "image_size": [64, 32],
        "options": TINY,
        "class_names": ["a", "b", "c"],
        "preprocessing": {
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "crop_pct": 0.7,
            "interpolation": "bilinear",
        },
        "best_weights": "raw",
        "inference_rule": "max",
    }


def test_missing_keys():
    short = ModelInfo.from_json({"model": "lvvit_m", "num_classes": 2, "image_size": 224})
    assert (short.image_size, short.preprocessing.crop_pct, short.class_names) == ((224, 224), 1.0, None)
    assert (short.options, short.best_weights) == ({}, None)
    with pytest.raises(ValueError, match="does not record its image_size"):
        ModelInfo.from_json({"model": "lvvit_m", "num_classes": 4})
    with pytest.raises(ValueError, match="does not record its model or its num_classes or its image_size"):
        ModelInfo.from_json({"dim": 4})


def test_records_of_version_0_1():
    """Their options are called overrides; interpolation and best weights are missing."""
    record = {
        "model": "lvvit_m",
        "num_classes": 3,
        "image_size": [64, 32],
        "overrides": TINY,
        "class_names": ["a", "b", "c"],
        "preprocessing": {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "crop_pct": 0.7},
    }
    info = ModelInfo.from_json(record)
    assert (info.options, info.best_weights, info.class_names) == (TINY, None, ("a", "b", "c"))
    assert info.preprocessing == Preprocessing((0.4, 0.5, 0.6), (0.1, 0.2, 0.3), 0.7, "bicubic")


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("lvvit_s", {}, "max"),
        ("lvvit_s", {"rule": "mean"}, "mean"),
        ("lvvit_s", {"token_head": False}, "class"),
        ("vit", {}, "class"),
        ("deit_tiny_patch16_224", {}, "class"),
        ("t2t_vit_7", {"token_head": True}, "max"),
        ("regnety_002", {}, "class"),
        ("dm_nfnet_f0", {}, "class"),
    ],
)
def test_inference_rule(name, options, rule):
    info = ModelInfo(name, 3, (32, 32), options)
    assert info.inference_rule == rule
    assert ModelInfo.from_json(info.to_json()) == info


def test_the_recorded_inference_rule_is_used():
    """A record keeps its rule even if the default of the model is another one."""
    record = {**ModelInfo("lvvit_s", 3, (32, 32)).to_json(), "inference_rule": "mean"}
    info = ModelInfo.from_json(record)
    assert info.inference_rule == "mean"
    assert info.options == {"rule": "mean"}


def test_inconsistent_values():
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        ModelInfo("lvvit_m", 3, (64, 64), class_names=("a", "b"))
    with pytest.raises(ValueError, match='best_weights must be "raw", "ema" or None, not \'auto\''):
        ModelInfo("lvvit_m", 3, (64, 64), best_weights="auto")


def test_published_preprocessing():
    crops = {
        n: published_preprocessing(n).crop_pct
        for n in ("lvvit_t", "lvvit_s", "lvvit_m", "lvvit_l", "t2t_vit_7")
    }
    assert crops == {"lvvit_t": 0.9, "lvvit_s": 0.9, "lvvit_m": 1.0, "lvvit_l": 1.0, "t2t_vit_7": 0.9}
    assert published_preprocessing("deit_tiny_patch16_224").crop_pct == 0.875
    assert published_preprocessing("dm_nfnet_f6").crop_pct == 0.956
    assert published_preprocessing("lvvit_s") == Preprocessing(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=0.9, interpolation="bicubic"
    )


@pytest.mark.parametrize(
    ("size", "pair"),
    [(224, (224, 224)), ("96", (96, 96)), ("64x32", (64, 32)), ([4, 8], (4, 8)), ((48,), (48, 48))],
)
def test_image_sizes(size, pair):
    assert parse_image_size(size) == pair


@pytest.mark.parametrize("size", ["", "axb", "1x2x3", 0, [-1, 4], (), (1, 2, 3)])
def test_invalid_image_sizes(size):
    with pytest.raises(ValueError, match="An image size is one number or HEIGHTxWIDTH"):
        parse_image_size(size)
