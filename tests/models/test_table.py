"""The table of models: published names, sizes, and the errors of wrong names."""

import gzip
import json

import pytest
from conftest import GOLDEN
from flax import nnx

import tlvit
from tlvit.models.table import published_crop_pct, published_image_size


def test_every_published_model_is_listed():
    with gzip.open(GOLDEN / "state_dicts.jsonl.gz", "rt") as lines:
        published = {json.loads(line)["model"] for line in lines}
    assert published <= set(tlvit.list_models())
    assert len(published) == 37
    sizes = ["002", "004", "006", "008", "016", "032", "040", "064", "080", "120", "160", "320"]
    regnets = {f"regnety_{size}" for size in sizes}
    deits = {f"deit_base{infix}_patch16_{size}" for infix in ("", "_distilled") for size in (224, 384)}
    assert regnets | deits <= set(tlvit.list_models())
    assert tlvit.list_models()[:2] == ["deit_base_distilled_patch16_224", "deit_base_distilled_patch16_384"]
    assert tlvit.list_models()[-1] == "vit"


@pytest.mark.parametrize(
    "name",
    ["lvvit_s", "t2t_vit_dense", "deit_tiny_distilled_patch16_224", "regnety_002", "dm_nfnet_f0",
     *(pytest.param(n, marks=pytest.mark.slow) for n in ("vit", "t2t_vit_7", "t2t_vit_16_ghost"))],
)  # fmt: skip
def test_every_family_takes_classes_and_sizes(name):
    """At 64 x 96 pixels with 5 classes; convolutional ones ignore the size."""
    model = nnx.eval_shape(lambda: tlvit.create_model(name, num_classes=5, image_size=[64, 96]))
    assert model.num_classes == 5
    convolutional = name.startswith(("regnety", "dm_nfnet"))
    assert model.grid == (None if convolutional else (4, 6))
    assert (model.head.fc if convolutional else model.head).kernel.shape[1] == 5


def test_the_size_is_the_names_unless_given():
    grid = lambda name, **options: nnx.eval_shape(lambda: tlvit.create_model(name, **options)).grid
    assert grid("lvvit_t") == grid("t2t_vit_7") == grid("deit_tiny_patch16_224") == (14, 14)
    assert grid("deit_base_patch16_384") == (24, 24)
    assert grid("deit_base_patch16_384", image_size=224) == (14, 14)


@pytest.mark.parametrize(
    ("name", "image_size", "crop_pct"),
    [
        ("lvvit_s", 224, 0.9), ("lvvit_m", 224, 1.0), ("lvvit_l", 448, 1.0), ("vit", 224, 0.9),
        ("t2t_vit_t_14", 224, 0.9), ("deit_base_distilled_patch16_384", 384, 0.875),
        ("deit_base_patch16_LS", 224, 1.0),
        ("regnety_160", 224, 0.875), ("dm_nfnet_f0", 256, 0.9), ("dm_nfnet_f6", 576, 0.956),
    ],
)  # fmt: skip
def test_published_evaluation_settings(name, image_size, crop_pct):
    assert published_image_size(name) == image_size
    assert published_crop_pct(name) == crop_pct


def test_seeds_differ_and_repeat():
    weight = lambda seed: tlvit.create_model(
        "deit_tiny_patch16_224", dim=12, depth=0, image_size=16, num_classes=3, seed=seed
    ).head.kernel[...]
    assert (weight(0) == weight(0)).all()
    assert (weight(0) != weight(1)).any()


def test_wrong_names_and_options():
    with pytest.raises(ValueError, match=r"'regnety_016x'; did you mean .*regnety_016"):
        tlvit.create_model("regnety_016x")
    with pytest.raises(ValueError, match=r"known: .*dm_nfnet_f0.*vit"):
        tlvit.create_model("???")
    with pytest.raises(TypeError, match="width"):
        tlvit.create_model("regnety_002", width=3)
