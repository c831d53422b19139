"""Options of models: unknown names, wrong types, impossible values, and sizes that exhaust the memory."""

import numpy as np
import pytest
from flax import nnx
from model_goldens import SMALL

import tlvit
from tlvit.models.options import MEANINGS, UnknownOption, check_image_size
from tlvit.models.table import MODELS, model_options

TINY = SMALL["lvvit"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lvvit_t", {"depth": -1}, "depth must be from 0 to 1000, not -1"),
        ("lvvit_t", {"depth": 2.5}, "depth must be an integer, not 2.5"),
        ("lvvit_t", {"depth": "12"}, "depth must be an integer, not '12'"),
        ("lvvit_t", {"depth": True}, "depth must be an integer, not True"),
        ("lvvit_t", {"dim": 0}, "dim must be from 1"),
        ("lvvit_t", {"dim": 10**9}, "dim must be from 1 to 16384, not 1000000000"),
        ("lvvit_t", {"num_heads": 0}, "num_heads must be from 1"),
        ("lvvit_t", {"num_heads": 5}, "Width 32 cannot be split over 5 heads"),
        ("lvvit_t", {"patch_size": 0}, "patch_size must be from 1"),
        ("lvvit_t", {"mlp_ratio": float("nan")}, "mlp_ratio must be a finite number, not nan"),
        ("lvvit_t", {"mlp_ratio": 0.001}, "widths 32, 0: every layer needs a channel"),
        ("lvvit_t", {"skip_lam": 0}, "skip_lam must be above 0"),
        ("lvvit_t", {"drop_rate": -0.1}, r"drop_rate must be in \[0, 1\), not -0.1"),
        ("lvvit_t", {"attn_drop": 1}, r"attn_drop must be in \[0, 1\), not 1"),
        ("lvvit_t", {"token_head": "false"}, "token_head must be true or false, not 'false'"),
        ("lvvit_t", {"dtype": "int8"}, "dtype must be a floating-point type .* not 'int8'"),
        ("lvvit_t", {"dtype": "half"}, None),
        ("lvvit_t", {"dtype": "bfloat17"}, "dtype must be a floating-point type .* not 'bfloat17'"),
        ("t2t_vit_7", {"depth": (1, -2)}, r"depth must be from 0 to 1000, not \(1, -2\)"),
        ("t2t_vit_14_se", {"dim": 8, "num_heads": 2}, "widths 8, 0"),
        ("regnety_002", {"widths": (64, "a")}, r"widths\[1\] must be an integer, not 'a'"),
        ("regnety_002", {"group_width": 0}, "group_width must be from 1"),
        ("dm_nfnet_f0", {"stem_width": 4}, "widths 3, 0"),
        ("dm_nfnet_f0", {"alpha": 0.0}, "alpha must be above 0"),
    ],
)  # fmt: skip
def test_impossible_values(name, options, message):
    family = next(sizes for prefix, sizes in SMALL.items() if name.startswith(prefix))
    make = lambda: nnx.eval_shape(lambda: tlvit.create_model(name, **{**family, **options}))
    if message is None:
        make()
    else:
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("num_classes", [0, -3, 2.5, "10", 10**7])
def test_impossible_numbers_of_classes(num_classes, unchecked_shapes):
    with pytest.raises(ValueError, match="num_classes must be an integer from 1 to 1,000,000, not"):
        tlvit.create_model("lvvit_t", **{**TINY, "num_classes": num_classes})


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("lvvit_t", 80_000, "An image of 80000x80000 has 6,400,000,000 pixels; the limit is 67,108,864"),
        ("regnety_002", (100_000, 1000), "An image of 100000x1000 has 100,000,000 pixels"),
        ("lvvit_t", 4112, r"4112x4112 with patches of 16 gives 257x257 = 66,049 tokens; the limit is 65,536"),
        ("t2t_vit_7", (8192, 8192), "262,144 tokens"),
        ("lvvit_t", 0, "image_size must be a number of pixels or"),
        ("lvvit_t", (32, -32), r"image_size must be .* not \(32, -32\)"),
        ("regnety_002", (32, 32, 3), "image_size must be"),
        ("regnety_002", "64", "image_size must be"),
    ],
)
def test_impossible_image_sizes(name, image_size, message, unchecked_shapes):
    """They are refused before anything is allocated."""
    with pytest.raises(ValueError, match=message):
        tlvit.create_model(name, image_size=image_size)


def test_numbers_of_numpy_and_lists_are_taken(unchecked_shapes):
    assert check_image_size([64, np.int64(32)]) == (64, 32)
    options = {**SMALL["regnety"], "widths": [64, 128], "se_ratio": np.float32(0.5)}
    model = nnx.eval_shape(lambda: tlvit.create_model("regnety_002", **options))
    assert model.s1.b1.se.fc1.kernel.shape == (1, 1, 64, 16)


def test_unknown_options_name_the_closest_one():
    with pytest.raises(ValueError, match=r"lvvit_s has no option 'depht'; did you mean depth\?"):
        tlvit.create_model("lvvit_s", depht=3)
    with pytest.raises(
        UnknownOption, match=r"has no option 'zzz'; known: widths, depths, group_width, .*dtype"
    ):
        tlvit.create_model("regnety_002", zzz=3)
    with pytest.raises(TypeError, match="has no option 'rngs'"):
        tlvit.create_model("lvvit_s", rngs=nnx.Rngs(0))


def test_defaults_are_those_of_the_published_model():
    options = model_options("lvvit_s")
    assert (options["dim"], options["depth"], options["skip_lam"]) == (384, 16, 2.0)
    assert (options["token_head"], options["drop_path"], options["dtype"]) == (True, 0.0, None)
    assert {"self", "rngs", "num_classes", "image_size"}.isdisjoint(options)
    for name in MODELS:
        assert tlvit.ModelInfo(name, 10, (224, 224), model_options(name)).options["dtype"] is None


def test_models_are_listed_by_pattern():
    assert tlvit.list_models("lvvit*") == ["lvvit", "lvvit_l", "lvvit_m", "lvvit_s", "lvvit_t"]
    assert tlvit.list_models("dm_nfnet_f?") == [f"dm_nfnet_f{n}" for n in range(7)]
    assert tlvit.list_models("resnet*") == []
    assert len(tlvit.list_models()) == len(MODELS)


def test_seeds_have_64_bits():
    with pytest.raises(ValueError, match="seed must be an integer of 64 bits, not 1180591620717411303424"):
        tlvit.create_model("lvvit_t", seed=2**70)


def test_every_option_has_a_meaning():
    options = {option for name in MODELS for option in model_options(name)}
    assert options == set(MEANINGS)
