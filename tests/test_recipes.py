"""Every config loads, holds only keys of configs/common.py and builds its model abstractly, with the
published recipe's values."""

import importlib
import pathlib

import pytest
from flax import nnx

from configs import common
from tlvit.checkpoints.model_info import ModelInfo, image_size_pair
from tlvit.models.functional import count_parameters, functionalize
from tlvit.training import optimizer as optim
from tlvit.training.check_config import check_numbers

CONFIGS = sorted(
    p.stem for p in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py") if p.stem != "common"
)
ARMS = {
    "digits": ["token_labels", "no_token_labels", "annotator"],
    "lvvit_folder": ["token_labels", "no_token_labels", "annotator"],
    "lvvit_finetune": ["lvvit_s", "lvvit_m", "lvvit_l"],
    "deit": ["deit_small_patch16_224", "deit_tiny_distilled_patch16_224"],
    "t2t_vit": ["t2t_vit_7", "t2t_vit_14", "t2t_vit_24", "t2t_vit_t_19"],
}
CASES = [(name, arm) for name in CONFIGS for arm in ARMS.get(name, [None])]


def load(name, arm=None):
    module = importlib.import_module(f"configs.{name}")
    return module.get_config(arm) if arm else module.get_config()


def keys(config, prefix=""):
    """Dotted names; the model's own options are free."""
    for key, value in config.items():
        if f"{prefix}{key}" == "model.options":
            yield "model.options"
        elif hasattr(value, "items"):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize(("name", "arm"), CASES)
def test_config_has_only_known_keys_and_builds_its_model(name, arm):
    config = load(name, arm)
    assert set(keys(config)) == set(keys(common.get_config()))
    check_numbers(config)
    info = ModelInfo(
        model=config.model.name,
        num_classes=10 if name == "digits" else 1000,
        image_size=image_size_pair(config.image_size),
        overrides={"dtype": config.model.dtype, **config.model.options.to_dict()},
    )
    _, params, _ = functionalize(nnx.eval_shape(info.build))
    assert count_parameters(params) > 10_000
    if config.token_labels:
        assert config.augment.mixup == config.augment.cutmix == 0


@pytest.mark.parametrize(("name", "arm"), CASES)
def test_docstring_holds_the_command(name, arm):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"python -m tlvit.main --config=configs/{name}.py" in text


@pytest.mark.parametrize(
    ("name", "drop_path", "learning_rate", "crop_pct", "size"),
    [
        ("lvvit_t", 0.1, 1.6e-3, 0.9, (224, 224)),
        ("lvvit_s", 0.1, 1.6e-3, 0.9, (224, 224)),
        ("lvvit_m", 0.2, 1.6e-3, 1.0, (224, 224)),
        ("lvvit_l", 0.3, 1e-3, 1.0, (448, 448)),
    ],
)
def test_published_recipe(name, drop_path, learning_rate, crop_pct, size):
    config = load(name)
    assert config.model.name == name
    assert config.model.options.drop_path == drop_path
    optimizer = config.optim
    assert (optimizer.learning_rate, optimizer.reference_batch) == (learning_rate, 1024)
    assert optimizer.weight_decay == 0.05
    assert (config.epochs, config.floor_epochs, config.optim.warmup_epochs) == (300, 10, 5)
    assert (config.optim.warmup_start, config.optim.floor, config.optim.schedule_per) == (1e-6, 1e-5, "epoch")
    assert (config.ema.decay, config.loss.smoothing, config.augment.erasing) == (0.99992, 0.1, 0.25)
    assert (config.loss.dense_weight, config.loss.cls_weight, config.loss.cls_target) == (
        1.0,
        1.0,
        "annotator",
    )
    assert (config.eval.crop_pct, image_size_pair(config.image_size)) == (crop_pct, size)
    assert config.token_labels
    assert config.data.name == "imagenet2012"


@pytest.mark.parametrize(
    ("model", "learning_rate", "weight_decay"),
    [("7", 1e-3, 0.03), ("12", 1e-3, 0.03), ("14", 5e-4, 0.05), ("t_19", 5e-4, 0.065), ("24", 5e-4, 0.065)],
)
def test_published_recipe_of_t2t_vit(model, learning_rate, weight_decay):
    config = load("t2t_vit", f"t2t_vit_{model}")
    assert (config.optim.learning_rate, config.optim.weight_decay) == (learning_rate, weight_decay)
    assert (config.batch_size, config.optim.reference_batch, config.optim.warmup_epochs) == (512, 512, 10)
    assert (config.augment.mixup, config.augment.cutmix, config.ema.decay) == (0.8, 1.0, 0.99996)
    assert not config.token_labels


def test_published_recipe_of_deit():
    config = load("deit", "deit_base_distilled_patch16_224")
    assert (config.optim.learning_rate, config.optim.reference_batch) == (5e-4, 512)
    assert (config.epochs, config.floor_epochs, config.optim.warmup_epochs) == (300, 0, 5)
    assert (config.augment.repeats, config.augment.mixup, config.augment.cutmix) == (3, 0.8, 1.0)
    assert (config.distill.kind, config.distill.alpha, config.distill.tau) == ("hard", 0.5, 1.0)
    assert config.eval.crop_pct == 0.875


def test_published_fine_tuning():
    config = load("lvvit_finetune", "lvvit_m")
    optimizer = config.optim
    assert (optimizer.learning_rate, optimizer.floor, optimizer.weight_decay) == (5e-6, 5e-6, 1e-8)
    assert (config.model.options.drop_path, config.token_labels) == (0.2, True)


@pytest.mark.parametrize("name", ["digits", "lvvit_folder", "lvvit_finetune", "deit", "t2t_vit"])
def test_an_unknown_arm_is_named(name):
    with pytest.raises(ValueError, match=f"configs/{name}.py:nonsense is unknown; after the colon comes"):
        load(name, "nonsense")


def test_published_schedule_at_known_epochs():
    config = load("lvvit_s")
    optimizer = config.optim
    schedule = optim.warmup_cosine(
        peak=optimizer.learning_rate,
        epochs=config.epochs,
        steps_per_epoch=1,
        warmup_epochs=optimizer.warmup_epochs,
        warmup_start=optimizer.warmup_start,
        floor=optimizer.floor,
    )
    assert float(schedule(0)) == pytest.approx(1e-6)
    assert float(schedule(150)) == pytest.approx((1.6e-3 + 1e-5) / 2)
    assert float(schedule(300)) == float(schedule(309)) == pytest.approx(1e-5)
