"""tlvit.summary: counts of parameters and multiply-adds equal the published ones."""

import re

import jax
import jax.numpy as jnp
import pytest

from tlvit import list_models, published, summary
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import save_model_folder
from tlvit.models.macs import count_macs
from tlvit.summary import _sizes, main, summarize, table

# Millions of parameters and billions of multiply-adds of the published implementations, rounded as published.
PUBLISHED = {
    ("lvvit_t", 224): (8.535, 2.9),
    ("lvvit_s", 224): (26.152, 6.6),
    ("lvvit_s", 384): (26.298, 22.2),
    ("lvvit_m", 224): (55.831, 12.7),
    ("lvvit_m", 384): (None, 42.2),
    ("lvvit_m", 448): (56.132, None),
    ("lvvit_l", 448): (150.474, 157),
    ("vit", 224): (24.405, 5.3),
    ("lvvit", 224): (25.767, 6.6),
    ("t2t_vit_7", 224): (4.310, 1.1),
    ("t2t_vit_10", 224): (5.889, 1.5),
    ("t2t_vit_12", 224): (None, 1.8),
    ("t2t_vit_14", 224): (21.546, 4.8),
    ("t2t_vit_19", 224): (39.177, 8.5),
    ("t2t_vit_24", 224): (64.106, 13.8),
    ("t2t_vit_t_14", 224): (21.541, 6.1),
    ("t2t_vit_t_19", 224): (39.2, 9.8),
    ("t2t_vit_t_24", 224): (64.101, 15.0),
    ("t2t_vit_14_resnext", 224): (21.546, None),
    ("t2t_vit_14_wide", 224): (25.156, None),
    ("t2t_vit_14_se", 224): (21.804, None),
    ("t2t_vit_dense", 224): (23.647, None),
    ("t2t_vit_16_ghost", 224): (16.253, None),
    ("deit_tiny_patch16_224", 224): (5.717, None),
    ("deit_small_patch16_224", 224): (22.051, None),
    ("deit_base_patch16_224", 224): (86.568, None),
    ("deit_tiny_distilled_patch16_224", 224): (5.911, None),
    ("deit_base_distilled_patch16_384", 384): (87.630, None),
    ("deit_small_patch16_LS", 224): (22.059, None),
    ("regnety_160", 224): (83.590, 16),
    ("dm_nfnet_f0", 256): (71.489, None),
    ("dm_nfnet_f6", 576): (438.359, None),
}
QUICK = ("lvvit_t", "t2t_vit_7")


@pytest.mark.parametrize(
    ("model", "size"),
    [pytest.param(*key, marks=() if key[0] in QUICK else pytest.mark.slow) for key in PUBLISHED],
)
def test_published_counts(model, size):
    parameters, macs = PUBLISHED[model, size]
    found = summarize(model, image_size=size)
    if parameters is not None:
        digits = len(str(parameters).split(".")[1])
        assert round(found.parameters / 1e6, digits) == parameters
    if macs is not None:
        assert found.macs / 1e9 == pytest.approx(macs, rel=0.03, abs=0.05)  # they are rounded to 0.1


def test_macs_of_products_convolutions_and_loops():
    count = lambda f, *shapes: count_macs(jax.make_jaxpr(f)(*(jnp.zeros(s) for s in shapes)).jaxpr)
    assert count(lambda a, b: a @ b, (2, 3), (3, 5)) == 2 * 3 * 5
    assert (
        count(lambda a, b: jnp.einsum("bhnd,bhmd->bhnm", a, b), (2, 3, 5, 7), (2, 3, 11, 7))
        == 2 * 3 * 5 * 11 * 7
    )

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", feature_group_count=2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert count(conv, (1, 8, 8, 4), (3, 5, 2, 6)) == (4 * 4 * 6) * (3 * 5 * 2)
    gradient = lambda x, kernel, y: jax.vjp(lambda x: conv(x, kernel), x)[1](y)
    forward_and_backward = count(gradient, (1, 8, 8, 4), (3, 5, 2, 6), (1, 4, 4, 6))
    assert forward_and_backward == 2 * (4 * 4 * 6) * (3 * 5 * 2)  # zeros of the dilated input do not count
    assert count(jax.jit(lambda a: jax.nn.relu(a @ a)), (4, 4)) == 64
    assert count(jax.checkpoint(lambda a: a @ a), (4, 4)) == 64
    assert count(lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, None, length=3)[0], (4, 4)) == 3 * 64
    dear, cheap = lambda a: a @ a @ a, lambda a: a
    assert count(lambda a: jax.lax.cond(a[0, 0] > 0, dear, cheap, a), (4, 4)) == 2 * 64


@pytest.mark.slow
def test_segmentation_models_are_measured():
    """With two images, because a pool of one cell cannot be normalized for one."""
    options = {"dim": 24, "depth": 2, "num_heads": 2, "channels": 8, "image_size": 32}
    one, two = (summarize("upernet", num_classes=n, **options) for n in (1, 2))
    assert two.parameters - one.parameters == 2 * (8 + 1)  # of two heads
    assert two.macs - one.macs == (8 * 8 + 2 * 2) * 8  # for both heads
    assert one.tokens == (2, 2)


@pytest.mark.slow
def test_activations_follow_depth_and_rematerialization():
    options = {"dim": 24, "num_heads": 2, "stem_width": 8, "image_size": 64}
    kept = lambda **more: summarize("lvvit_s", **options, **more).activation_bytes
    two, four, six = (kept(depth=d) for d in (2, 4, 6))
    assert six - four == four - two
    # A block on 17 tokens of width 24: qkv (3), the 2 attention maps of 17 x 17, their result, the norms'
    # and the MLP's (3 times as wide) inputs and outputs: more than 10, less than 40 arrays of 17 x 24 floats.
    assert 10 < (four - two) / 2 / (17 * 24 * 4) < 40
    assert kept(depth=6, remat=True) - kept(depth=4, remat=True) < (six - four) / 5


@pytest.mark.slow
def test_published_accuracy_is_that_of_the_image_size():
    small, large, odd = (summarize("lvvit_t", image_size=s) for s in (224, 448, (64, 96)))
    assert (small.top1, large.top1, odd.top1) == (79.1, None, None)
    assert (small.tokens, odd.tokens) == ((14, 14), (4, 6))
    assert "2104.10858" in small.source
    assert large.macs > 4 * small.macs
    assert summarize("lvvit_t", depth=2).top1 is None  # not the published model
    lines = table([small, odd]).splitlines()
    assert lines[2] == "| `lvvit_t` | 224 | 8.5 M | 2.9 G | 112 MB | 79.1 |"
    assert lines[3].startswith("| `lvvit_t` | 64x96 | 8.5 M |")


def test_command(capsys):
    assert main(["lvvit_t", "--image-size=64", "--num-classes=10"]) == 0
    printed = capsys.readouterr().out
    assert "tokens      4 x 4" in printed
    assert "unknown at this size" in printed
    options = re.findall(r"^  (\S+)", printed.partition("options")[2], re.MULTILINE)
    assert options[:5] == ["patch_size=16", "dim=240", "depth=12", "num_heads=4", "mlp_ratio=3.0"]
    assert options[-6:] == [
        "rule='max'", "token_weight=0.5", "attention='xla'", "remat=False", "scan_blocks=False", "dtype=None"
    ]  # fmt: skip
    assert "  patch_size=16           side of a patch, pixels\n" in printed
    assert main(["lvvit_x"]) == 1
    assert "did you mean" in capsys.readouterr().err
    for argument, message in (
        ("--num-classes=0", "must be an integer from 1 to 1000000, not '0'"),
        ("--num-classes=-5", "must be an integer from 1 to 1000000, not '-5'"),
        ("--image-size=100000", "An image size is at most 4096 pixels, not 100000."),
    ):
        with pytest.raises(SystemExit) as exit:
            main(["lvvit_t", argument])
        assert exit.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_several_models(capsys):
    assert main(["lvvit_t", "regnety_002", "--image-size=64"]) == 0
    names = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model")]
    assert [line.split()[1] for line in names] == ["lvvit_t", "regnety_002"]


def test_model_of_a_checkpoint(tmp_path, capsys):
    options = {"dim": 24, "depth": 2, "num_heads": 2, "stem_width": 8}
    info = ModelInfo("lvvit_s", 10, (64, 96), options)
    save_model_folder(tmp_path / "m", info.build(), info)
    assert main([f"--checkpoint={tmp_path / 'm'}"]) == 0
    found = summarize("lvvit_s", num_classes=10, image_size=(64, 96), **options)
    printed = capsys.readouterr().out
    assert f"parameters  {found.parameters:,} " in printed
    assert "image       64 x 96" in printed
    assert "tokens      4 x 6" in printed
    for option in ("dim=24", "depth=2", "num_heads=2"):
        assert f"  {option} " in printed
    assert main([f"--checkpoint={tmp_path / 'missing'}"]) == 1
    assert "missing" in capsys.readouterr().err


def test_the_model_zoo_is_for_all_models_at_their_published_sizes(capsys, monkeypatch):
    monkeypatch.setattr(summary.model_zoo, "tables", lambda: "## tables")
    assert main(["--all", "--markdown"]) == 0
    assert capsys.readouterr().out == "## tables\n"
    for arguments in (["lvvit_t", "--markdown"], ["--all", "--markdown", "--image-size=64"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "--markdown goes with --all alone" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["lvvit_t", "--all"], ["--all", "--checkpoint=x"]])
def test_one_way_to_choose_models(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "give names of models, --checkpoint or --all" in capsys.readouterr().err


@pytest.mark.slow
def test_table_of_all_models(capsys, monkeypatch):
    monkeypatch.setattr(summary, "list_models", lambda: ["lvvit_t", "regnety_004", "t2t_vit_10", "t2t_vit_7"])
    assert main(["--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model | image |")
    assert [line.split("`")[1] for line in lines[2:]] == ["lvvit_t", "regnety_004", "t2t_vit_7", "t2t_vit_10"]


def test_all_sizes_with_a_published_accuracy_are_listed():
    assert {entry.model for entry in published.PUBLISHED} <= set(list_models())
    assert _sizes("lvvit_m", None) == [224, 384, 448]
    assert _sizes("regnety_004", None) == [224]
    assert _sizes("lvvit_m", (64, 64)) == [(64, 64)]
