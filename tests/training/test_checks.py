"""Settings that do not fit the model or the workdir are refused."""

import json

import pytest
from flax import nnx

from configs import digits
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import default, resolve, to_dict
from tlvit.models.functional import functionalize
from tlvit.training.checks import check_heads, check_model, check_workdir, mixes_images


def config_for(**changes):
    """The digits recipe without token labels, changed."""
    config = digits.get_config("no_token_labels")
    config.batch_size = 16
    config.update_from_flattened_dict(changes)
    return resolve(config)


def net_of(name, **options):
    return functionalize(nnx.eval_shape(ModelInfo(name, 10, (64, 64), options).build))[0]


def labeled(**changes):
    """The default settings, with token labels."""
    config = default()
    config.data.score_maps = "maps"
    config.update_from_flattened_dict(changes)
    return resolve(config)


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        (labeled(**{"model.name": "vit"}), ("vit", {}), "needs a model with a token head, but vit has none"),
        (labeled(**{"data.score_maps": ""}), ("lvvit_t", {}), "config.data.score_maps is empty"),
        (labeled(**{"augment.randaugment": "rand-x9"}), ("lvvit_t", {}), "has the piece 'x9'"),
        (
            labeled(**{"model.init_required": True}),
            ("lvvit_t", {}),
            "This recipe fine-tunes, but config.model.init_from is empty",
        ),
        (
            labeled(**{"model.name": "regnety_002", "loss.dense_weight": 0.0}),
            ("regnety_002", {}),
            "mixes patch tokens, but regnety_002 has none. Set config.loss.mixtoken=False",
        ),
        (
            labeled(**{"data.score_maps": "", "loss.dense_weight": 0.0}),
            ("lvvit_t", {}),
            "config.data.score_maps is empty",
        ),
        (config_for(), ("deit_tiny_distilled_patch16_224", {}), "distillation token, which only a teacher"),
        (config_for(**{"distill.teacher": "t.pth"}), ("lvvit_t", {}), "lvvit_s has no distillation token"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model(config, model, message):
    with pytest.raises(ValueError, match=message):
        check_model(config, net_of(model[0], **model[1]))


def test_what_fits_the_model():
    check_model(labeled(), net_of("lvvit_t"))
    check_model(labeled(**{"data.score_maps": "", "data.annotator": "a"}), net_of("lvvit_t"))
    check_model(labeled(**{"model.name": "t2t_vit_7"}), net_of("t2t_vit_7", token_head=True))
    check_model(config_for(), net_of("vit"))
    check_model(labeled(**{"model.init_required": True, "model.init_from": "w"}), net_of("lvvit_t"))
    pooled = {"loss.dense_weight": 0.0, "loss.mixtoken": False}  # the class token alone learns
    check_model(labeled(**{"model.name": "vit", **pooled}), net_of("vit"))
    check_model(labeled(**{"model.name": "regnety_002", **pooled}), net_of("regnety_002"))
    no_maps = {"data.score_maps": "", "loss.dense_weight": 0.0, "loss.cls_target": "label"}
    check_model(labeled(**{"model.name": "vit", **no_maps}), net_of("vit"))
    check_model(config_for(**{"distill.teacher": "t.pth"}), net_of("deit_tiny_distilled_patch16_224"))


def test_the_model_axis_divides_the_heads():
    six = labeled(**{"model.name": "lvvit_s"})
    for devices in (1, 2, 3, 6):
        check_heads(six, devices)
    with pytest.raises(
        ValueError, match=r"model=4 cannot divide the 6 attention heads of lvvit_s .*; 1, 2, 3, 6 can"
    ):
        check_heads(six, 4)
    check_heads(labeled(**{"model.options.num_heads": 8}), 4)
    check_heads(labeled(**{"model.name": "regnety_160"}), 1)
    with pytest.raises(ValueError, match="model=2 divides attention heads, but regnety_160 has none"):
        check_heads(labeled(**{"model.name": "regnety_160"}), 2)
    for kind in ("fused", "auto"):
        fused = labeled(**{"model.name": "lvvit_s", "model.options.attention": kind})
        check_heads(fused, 1)
        with pytest.raises(
            ValueError, match=rf'"{kind}" does not divide the heads .* and config\.mesh\.model is 2'
        ):
            check_heads(fused, 2)


def test_which_settings_mix_images():
    assert mixes_images(labeled())
    assert not mixes_images(labeled(**{"loss.mixtoken": False}))
    assert mixes_images(config_for(**{"augment.mixup": 0.1, "augment.cutmix": 0.0}))
    plain = {"augment.mixup": 0.0, "augment.cutmix": 0.0, "loss.plain_labels": True}
    assert not mixes_images(config_for(**plain))


def workdir_of(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 1), ("image_size", (64, 64)), ("token_labels", True), ("model.name", "lvvit_m"),
     ("model.options.depth", 3), ("data.name", "mnist"), ("data.train_split", "train[:50%]"),
     ("batch_size", 8)],
)  # fmt: skip
def test_a_workdir_belongs_to_one_model_and_one_data_set(key, value, tmp_path):
    old, new = config_for(), config_for(**{key: value})
    path = workdir_of(tmp_path, old)
    check_workdir(path, old)
    with pytest.raises(ValueError, match=r"holds another run. Use a new --workdir") as caught:
        check_workdir(path, new)
    name = ".".join(key.split(".")[:2])
    assert str(caught.value).splitlines()[1].startswith(f"  {name}: ")
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim.learning_rate": 1.0, "epochs": 99, "data.dir": "/elsewhere", "log_every": 9},
        {"optim.clip_norm": 1.0, "model.dtype": "bfloat16"},  # remedies for a loss that is not finite
    ],
)
def test_a_workdir_may_be_resumed_with_other_settings(changes, tmp_path):
    check_workdir(workdir_of(tmp_path, config_for()), config_for(**changes))
    check_workdir(tmp_path / "new", config_for())


def test_another_order_of_the_images_is_logged(tmp_path, caplog):
    path = workdir_of(tmp_path, config_for())
    with caplog.at_level("WARNING", "tlvit"):
        check_workdir(path, config_for(**{"data.shuffle_gib": 0.5}))
    assert "data.shuffle_gib was 2.0 and is now 0.5: the order of the images changes" in caplog.text
