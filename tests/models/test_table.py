"""The table of models: every published name builds, wrong names are told what is near."""

import gzip
import json

import pytest
from conftest import GOLDEN
from flax import nnx

import tlvit
from tlvit.models.table import MODELS


def test_every_published_model_is_listed():
    with gzip.open(GOLDEN / "state_dicts.jsonl.gz", "rt") as lines:
        published = {json.loads(line)["model"] for line in lines}
    assert published <= set(tlvit.list_models())
    assert len(published) == 37
    assert tlvit.list_models() == sorted(MODELS)
    sizes = ["002", "004", "006", "008", "016", "032", "040", "064", "080", "120", "160", "320"]
    assert {f"regnety_{size}" for size in sizes} <= set(MODELS)


@pytest.mark.parametrize(
    "name",
    ["lvvit_s", "vit", "t2t_vit_7", "t2t_vit_dense", "t2t_vit_16_ghost", "deit_tiny_distilled_patch16_224",
     "regnety_002", "dm_nfnet_f0"],
)  # fmt: skip
def test_every_family_takes_classes_and_sizes(name):
    """At 64 x 96 pixels with 5 classes; convolutional ones take the size and need none."""
    model = nnx.eval_shape(lambda: tlvit.create_model(name, num_classes=5, image_size=[64, 96]))
    assert model.num_classes == 5
    assert getattr(model, "grid", (4, 6)) == (4, 6)
    head = model.head if hasattr(model.head, "kernel") else model.head.fc
    assert head.kernel.shape[1] == 5


def test_the_size_is_the_names_unless_given():
    grid = lambda name, **options: nnx.eval_shape(lambda: tlvit.create_model(name, **options)).grid
    assert grid("lvvit_t") == grid("t2t_vit_7") == grid("deit_tiny_patch16_224") == (14, 14)
    assert grid("deit_base_patch16_384") == (24, 24)
    assert grid("deit_base_patch16_384", image_size=224) == (14, 14)


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
