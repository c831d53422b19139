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
            "scale": [],  # of segmentation models, as window and stride
            "window": 0,
            "stride": 0,
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


def test_what_a_run_adds_to_the_record_is_left_out():
    record = {**INFO.to_json(), "run": {"config": {}}, "step": 400, "weights": "ema"}
    assert ModelInfo.from_json(record) == INFO


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


PREPROCESSING = INFO.to_json()["preprocessing"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": 1}, "modle is an unknown key; did you mean model?"),
        ({"model": 3}, "model must be text, not 3"),
        ({"model": "lvvit_x"}, "Unknown model 'lvvit_x'; did you mean"),
        ({"num_classes": "3"}, "num_classes must be an integer, not '3'"),
        ({"num_classes": 0}, "num_classes must be an integer from 1 to 1,000,000, not 0"),
        ({"image_size": "64x32"}, "image_size must be a list, not '64x32'"),
        ({"image_size": [64]}, "image_size must have 2 values, not 1"),
        ({"image_size": [0, 64]}, r"image_size must be .* not \(0, 64\)"),
        ({"image_size": [10**9, 10**9]}, "1,000,000,000,000,000,000 pixels; the limit is"),
        ({"options": []}, r"options must be an object, not \[\]"),
        ({"options": {"depht": 1}}, "lvvit_m has no option 'depht'; did you mean depth?"),
        ({"options": {"depth": -1}}, "depth must be from 0 to 1000, not -1"),
        ({"class_names": "abc"}, "class_names must be a list, not 'abc'"),
        ({"class_names": ["a", "b", 3]}, r"class_names\[2\] must be text, not 3"),
        ({"class_names": ["a"]}, "1 class names for 3 classes"),
        ({"best_weights": 3}, "best_weights must be text, not 3"),
        ({"preprocessing": []}, r"preprocessing must be an object, not \[\]"),
        ({"preprocessing": {"stdd": 1}}, "preprocessing.stdd is an unknown key; did you mean std?"),
        ({"preprocessing": {"crop_pct": 0}}, "crop_pct must be above 0 and at most 1, not 0"),
        ({"preprocessing": {"crop_pct": "0.9"}}, "preprocessing.crop_pct must be a number, not '0.9'"),
        ({"preprocessing": {"crop_pct": float("nan")}}, "crop_pct must be a finite number, not nan"),
        ({"preprocessing": {"std": [0, 1, 1]}}, "std must be above 0, not"),
        ({"preprocessing": {"std": [0.1, 0.1]}}, "preprocessing.std must have 3 values, not 2"),
        ({"preprocessing": {"mean": [123.7, 116.3, 103.5]}}, r"mean must be three numbers .* \[0, 1\], not"),
        ({"preprocessing": {"interpolation": "lanczos"}}, "must be 'bicubic' or 'bilinear', not 'lanczos'"),
        ({"inference_rule": "maxx"}, "inference_rule must be max or mean or class, not 'maxx'"),
        ({"inference_rule": [1]}, "inference_rule must be max or mean or class"),
        ({"model": "regnety_002", "options": {}, "inference_rule": "mean"}, "no option 'rule'"),
    ],
)
def test_damaged_records_name_the_file_the_key_and_the_value(change, message):
    if isinstance(change.get("preprocessing"), dict):
        change = {"preprocessing": {**PREPROCESSING, **change["preprocessing"]}}
    with pytest.raises(ValueError, match=message) as caught:
        ModelInfo.from_json({**INFO.to_json(), **change}, "runs/x")
    assert str(caught.value).startswith("runs/x: ")


def test_preprocessing_checks_itself():
    for values, message in [
        ({"crop_pct": float("nan")}, "crop_pct must be above 0 and at most 1, not nan"),
        ({"std": (0.0, 0.2, 0.2)}, "std must be above 0"),
        ({"mean": (0.5, float("inf"), 0.5)}, "mean must be three numbers"),
        ({"mean": (0.5, 0.5)}, "mean must be three numbers"),
        ({"interpolation": "nearest"}, "interpolation must be bicubic or bilinear, not 'nearest'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Preprocessing(**values)
    assert Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3).crop_pct == 0.875  # pixels in [0, 1] as they are


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
