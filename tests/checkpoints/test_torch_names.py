"""Official names and layouts of every model, in both directions, and which differences are allowed."""

import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, fill
from flax import nnx

from tlvit import create_model
from tlvit.checkpoints.torch_names import as_float32, from_torch, identify, official_shapes, to_torch
from tlvit.models.table import published_image_size
from tlvit.ops.resize import resize_pos_embed

with gzip.open(GOLDEN / "state_dicts.jsonl.gz", "rt") as lines:
    OFFICIAL = {record["model"]: record["tensors"] for record in map(json.loads, lines)}

TINY = {"dim": 24, "depth": 2, "num_heads": 2, "stem_width": 8}


def tiny(**options):
    return create_model("lvvit_s", **{"num_classes": 5, "image_size": 64, **TINY, **options})


def filled(model):
    return {k: v if v.dtype == np.int64 else fill(k, v.shape) for k, v in to_torch(model).items()}


QUICK = (  # one of each structure; the others differ in width, depth or image size
    "lvvit", "lvvit_s", "vit", "deit_base_patch16_384", "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224", "t2t_vit_14", "t2t_vit_t_14", "t2t_vit_14_resnext", "t2t_vit_14_se",
    "t2t_vit_16_ghost", "t2t_vit_dense", "regnety_032", "dm_nfnet_f0",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in sorted(OFFICIAL)]
)
def test_names_and_shapes_are_the_official_ones(name):
    wanted = {k: tuple(shape) for k, shape, _ in OFFICIAL[name] if not k.endswith("num_batches_tracked")}
    size = published_image_size(name)
    if "pos_embed" in wanted:
        side = int((wanted["pos_embed"][1] - 1) ** 0.5)
        size = 16 * side
    assert official_shapes(nnx.eval_shape(lambda: create_model(name, image_size=size))) == wanted


@pytest.mark.parametrize("name", ["lvvit_t", "deit_tiny_distilled_patch16_224"])
def test_every_tensor_of_torch_is_exported_with_its_type_and_in_order(name):
    exported = to_torch(create_model(name, image_size=224))
    wanted = [(k, tuple(shape), dtype) for k, shape, dtype in OFFICIAL[name]]
    assert [(k, v.shape, str(v.dtype)) for k, v in exported.items()] == wanted


def test_round_trip_is_bit_equal():
    tensors = filled(tiny())
    model = tiny(seed=1)
    report = from_torch(model, tensors)
    assert len(report.loaded) == len([k for k in tensors if "num_batches" not in k])
    assert (report.resized, report.reinitialized, report.unexpected) == ((), (), ())
    for name, array in to_torch(model).items():
        np.testing.assert_array_equal(array, tensors[name], err_msg=name)


def test_only_kernels_are_transposed():
    class Odd(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.w = nnx.BatchStat(jnp.arange(6.0).reshape(2, 3))
            self.gain = nnx.Param(jnp.ones((4, 1, 1, 1)))
            self.line = nnx.Linear(2, 3, rngs=rngs)
            self.grouped = nnx.Conv(4, 6, (3, 5), feature_group_count=2, rngs=rngs)
            self.one = nnx.Conv(4, 4, (3,), feature_group_count=4, rngs=rngs)

    model = Odd()
    tensors = to_torch(model)
    np.testing.assert_array_equal(tensors["w"], np.arange(6.0).reshape(2, 3))
    assert tensors["gain"].shape == (4, 1, 1, 1)
    np.testing.assert_array_equal(tensors["line.weight"], model.line.kernel[...].T)
    assert tensors["grouped.weight"].shape == (6, 2, 3, 5)  # torch: [out, in / groups, height, width]
    assert tensors["grouped.weight"][4, 1, 2, 3] == model.grouped.kernel[...][2, 3, 1, 4]
    assert tensors["one.weight"].shape == (4, 1, 3)
    from_torch(model, {k: v + 1 for k, v in tensors.items()})
    for name, array in to_torch(model).items():
        np.testing.assert_array_equal(array, tensors[name] + 1, err_msg=name)


def test_misfits_are_listed_and_nothing_changes():
    model = tiny()
    before = to_torch(model)
    tensors = {**filled(model), "extra.weight": np.zeros((2, 3)), "norm.weight": np.zeros(7)}
    del tensors["head.bias"]
    with pytest.raises(ValueError, match="3 tensors do not fit this LVViT") as caught:
        from_torch(model, tensors)
    for line in (
        "head.bias: missing, wanted [5]",
        "norm.weight: is [7], wanted [24]",
        "extra.weight: unexpected",
    ):
        assert line in str(caught.value)
    for name, array in to_torch(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_a_tensor_that_is_not_numeric_changes_nothing():
    model = tiny()
    before = to_torch(model)
    with pytest.raises(ValueError, match=r"norm\.bias cannot become float32"):
        from_torch(model, {**filled(model), "norm.bias": np.full(24, "x")})
    np.testing.assert_array_equal(to_torch(model)["norm.weight"], before["norm.weight"])


def test_another_number_of_classes_must_be_allowed():
    tensors = filled(tiny())
    model = tiny(num_classes=7)
    kept = to_torch(model)
    with pytest.raises(ValueError, match=r"head.weight: is \[5, 24\], wanted \[7, 24\]"):
        from_torch(model, tensors)
    report = from_torch(model, tensors, allow=("head", "aux_head"))
    assert sorted(report.reinitialized) == ["aux_head.bias", "aux_head.weight", "head.bias", "head.weight"]
    np.testing.assert_array_equal(to_torch(model)["head.weight"], kept["head.weight"])
    np.testing.assert_array_equal(to_torch(model)["norm.weight"], tensors["norm.weight"])


def test_allow_may_be_one_string():
    tensors = filled(tiny(token_head=False))
    assert from_torch(tiny(), tensors, allow="aux_head").reinitialized == ("aux_head.bias", "aux_head.weight")
    assert from_torch(tiny(token_head=False), filled(tiny()), allow="aux_head").unexpected == (
        "aux_head.bias",
        "aux_head.weight",
    )


def test_a_missing_token_head_may_start_from_the_class_head():
    tensors = filled(tiny(token_head=False))
    model = tiny()
    report = from_torch(model, tensors, missing="aux_head")
    assert report.copied == ("aux_head.bias from head.bias", "aux_head.weight from head.weight")
    assert report.reinitialized == ()
    np.testing.assert_array_equal(to_torch(model)["aux_head.weight"], tensors["head.weight"])


@pytest.mark.parametrize(("old", "new"), [(14, 24), pytest.param(24, 14, marks=pytest.mark.slow)])
def test_position_embeddings_are_resized_as_published(golden, old, new):
    values = golden("target_visible.npz")
    build = lambda side: tiny(dim=8, image_size=16 * side)
    tensors = {**to_torch(build(old)), "pos_embed": values[f"pos/{old}to{new}/in"]}
    model = build(new)
    from_torch(model, tensors, allow="pos_embed")
    np.testing.assert_allclose(to_torch(model)["pos_embed"], values[f"pos/{old}to{new}/out"], atol=1e-5)


@pytest.mark.slow
def test_position_embeddings_of_any_grid():
    tensors = filled(tiny())
    model = tiny(image_size=(96, 32))
    with pytest.raises(ValueError, match=r"pos_embed: is \[1, 17, 24\], wanted \[1, 13, 24\]"):
        from_torch(model, tensors)
    report = from_torch(model, tensors, allow="pos_embed")
    assert report.resized == ("pos_embed",)
    wide = to_torch(model)
    np.testing.assert_array_equal(wide["pos_embed"][:, 0], tensors["pos_embed"][:, 0])
    assert not np.allclose(wide["pos_embed"][:, 1:].std(), 0)
    back = tiny()
    before = to_torch(back)
    with pytest.raises(ValueError, match="give old_grid"):
        from_torch(back, wide, allow="pos_embed")
    np.testing.assert_array_equal(to_torch(back)["norm.weight"], before["norm.weight"])
    assert from_torch(back, wide, allow="pos_embed", pos_grid=(6, 2)).resized == ("pos_embed",)


def test_position_embeddings_of_a_transposed_grid_are_resized():
    """Grids of 2x6 and 6x2 have the same number of tokens, so only the grids tell them apart."""
    tensors = filled(tiny(image_size=(32, 96)))
    model = tiny(image_size=(96, 32))
    with pytest.raises(ValueError, match="pos_embed: is for 2x6 tokens, wanted 6x2"):
        from_torch(model, tensors, pos_grid=(2, 6))
    assert from_torch(model, tensors, allow="pos_embed", pos_grid=(2, 6)).resized == ("pos_embed",)
    wanted = resize_pos_embed(jnp.asarray(tensors["pos_embed"]), (6, 2), num_prefix=1, old_grid=(2, 6))
    np.testing.assert_array_equal(to_torch(model)["pos_embed"], wanted)
    assert from_torch(model, tensors, allow="pos_embed", pos_grid=(6, 2)).resized == ()


def test_position_embeddings_of_another_width_are_refused():
    tensors = {**filled(tiny()), "pos_embed": np.zeros((1, 10, 23))}
    with pytest.raises(ValueError, match=r"pos_embed: \[1, 10, 23\] cannot be resized to \[1, 17, 24\]"):
        from_torch(tiny(), tensors, allow="pos_embed")


@pytest.mark.slow
def test_fixed_tables_are_regenerated():
    model = create_model("t2t_vit_7", num_classes=3, image_size=96)
    own = to_torch(model)["pos_embed"]
    tensors = {k: v for k, v in to_torch(create_model("t2t_vit_7", num_classes=3, image_size=64)).items()}
    report = from_torch(model, tensors, allow="pos_embed")
    assert report.resized == ("pos_embed",)
    np.testing.assert_array_equal(to_torch(model)["pos_embed"], own)
    np.testing.assert_allclose(
        own[:, : 1 + 16], tensors["pos_embed"], atol=1e-6
    )  # a sinusoid: the same start


def test_float_types():
    exact = np.array([[1.0, -2.5], [0.125, 3.0]])
    for array in (
        exact,
        exact.astype(np.float16),
        jnp.asarray(exact, jnp.bfloat16),
        np.asarray(exact.tolist()),
    ):
        result = as_float32("x", array)
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, exact)
    for bad in (exact + 1j, np.array(["a"]), np.array([None])):
        with pytest.raises(ValueError, match="x cannot become float32"):
            as_float32("x", bad)


def test_report_is_a_short_table():
    report = from_torch(tiny(num_classes=7), filled(tiny()), allow=("head", "aux_head"))
    lines = str(report).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["loaded", str(len(report.loaded))],
        ["resized", "0"],
        ["reinitialized", "4"],
        ["unexpected", "0"],
    ]
    assert "head.weight" in lines[2]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("lvvit_t", 224),
        ("lvvit", 64),
        ("deit_tiny_distilled_patch16_224", 224),
        pytest.param("deit_base_patch16_384", 384, marks=pytest.mark.slow),
    ],
)
def test_models_are_recognized(name, size):
    model = nnx.eval_shape(lambda: create_model(name, num_classes=11, image_size=size))
    tensors = {k: np.broadcast_to(np.float32(0), shape) for k, shape in official_shapes(model).items()}
    info = identify(tensors)
    assert (info.model, info.num_classes, info.image_size) == (name, 11, (size, size))
    assert info.options == {}


@pytest.mark.slow
def test_models_with_equal_tensors_are_not_guessed():
    shapes = official_shapes(nnx.eval_shape(lambda: create_model("t2t_vit_14")))
    tensors = {k: np.broadcast_to(np.float32(0), shape) for k, shape in shapes.items()}
    with pytest.raises(ValueError, match="fit t2t_vit_14, t2t_vit_14_resnext: say which"):
        identify(tensors)
    assert identify(tensors, model="t2t_vit_14").model == "t2t_vit_14"
    with pytest.raises(ValueError, match="No model has exactly these 1 tensors"):
        identify({"conv1.weight": np.zeros((2, 2))})
