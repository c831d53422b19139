"""Every recipe resolves, builds its model abstractly, and has the published values."""

import dataclasses
import functools
import importlib

import jax
import pytest
from conftest import ROOT
from flax import nnx

from tlvit.config import parse_image_size, resolve, to_dict
from tlvit.main import recipe_names
from tlvit.models.functional import count_parameters, functionalize
from tlvit.models.table import published_crop_pct
from tlvit.training.optimizer import decay_mask, learning_rate_factors, make_schedule
from tlvit.training.run_data import model_info

RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
VARIANTS = {
    "digits": ["token_labels", "no_token_labels", "relabel", "annotator"],
    "digits_small": ["token_labels", "no_token_labels", "annotator"],
    "lvvit_folder": ["token_labels", "no_token_labels", "annotator"],
    "lvvit_finetune": ["lvvit_s", "lvvit_m", "lvvit_l"],
    "lvvit_l": ["448", "224"],
    "lvvit_mixtoken": ["lvvit_s", "lvvit_l"],
    "deit": [
        "deit_small_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "deit_base_distilled_patch16_384",
    ],
    "deit3": ["small", "base", "base_224", "small_384"],
    "relabel": ["deit_small_patch16_224", "lvvit_s", "t2t_vit_14"],
    "t2t_vit": ["t2t_vit_7", "t2t_vit_14", "t2t_vit_24", "t2t_vit_t_19", "t2t_vit_14_384"],
    "transfer": ["cifar10", "cifar100", "deit_cars", "deit_inat2018", "folder"],
    "upernet_lvvit": ["s", "m", "l"],
}
CASES = [(name, variant) for name in RECIPES for variant in VARIANTS.get(name, [None])]


class Source:
    """The attributes of a source that `model_info` reads."""

    num_classes, class_names = 1000, None


def load(name, variant=None):
    """The recipe's settings, resolved."""
    module = importlib.import_module(f"configs.{name}")
    return resolve(module.get_config(variant) if variant else module.get_config())


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_recipe_resolves_and_builds_its_model(name, variant):
    config = load(name, variant)
    _, params, _ = functionalize(nnx.eval_shape(model_info(config, Source()).build))
    assert count_parameters(params) > 10_000
    assert resolve(to_dict(config)) == config


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_the_docstring_has_command_hardware_and_results(name, variant):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"python -m tlvit.main --config=configs/{name}.py" in text
    text = " ".join(text.split())
    assert all(word in text for word in ("Hardware:", "Published", "Measured with tlvit:"))


def test_recipes_import_the_settings_only():
    for name in RECIPES:
        lines = (ROOT / "configs" / f"{name}.py").read_text().splitlines()
        imports = [line for line in lines if line.startswith(("import ", "from "))]
        assert [line.split()[1] for line in imports] == ["tlvit.config"], name


def test_recipes_are_found_by_name():
    assert recipe_names() == RECIPES


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
    assert config.model.options["drop_path"] == drop_path
    optim = config.optim
    assert (optim.learning_rate, optim.base_batch_size) == (learning_rate, 1024)
    assert optim.weight_decay == 0.05
    assert (config.epochs, config.cooldown_epochs, optim.warmup_epochs) == (300, 10, 5)
    assert (optim.warmup_lr, optim.min_lr, optim.schedule_unit) == (1e-6, 1e-5, "epoch")
    loss, augment = config.loss, config.augment
    assert (config.ema.decay, loss.label_smoothing, augment.random_erasing) == (0.99992, 0.1, 0.25)
    assert (loss.dense_weight, loss.cls_weight, loss.cls_target) == (1.0, 1.0, "annotator")
    assert (model_info(config, Source()).preprocessing.crop_pct, config.image_size) == (crop_pct, size)
    assert config.token_labels
    assert config.data.name == "imagenet2012"


@pytest.mark.parametrize(
    ("model", "learning_rate", "weight_decay"),
    [("7", 1e-3, 0.03), ("12", 1e-3, 0.03), ("14", 5e-4, 0.05), ("t_19", 5e-4, 0.065), ("24", 5e-4, 0.065)],
)
def test_published_recipe_of_t2t_vit(model, learning_rate, weight_decay):
    config = load("t2t_vit", f"t2t_vit_{model}")
    assert (config.optim.learning_rate, config.optim.weight_decay) == (learning_rate, weight_decay)
    assert (config.batch_size, config.optim.base_batch_size, config.optim.warmup_epochs) == (512, 512, 10)
    assert (config.augment.mixup, config.augment.cutmix, config.ema.decay) == (0.8, 1.0, 0.99996)
    assert not config.token_labels


def test_published_recipe_of_deit():
    config = load("deit", "deit_base_distilled_patch16_224")
    assert (config.optim.learning_rate, config.optim.base_batch_size) == (5e-4, 512)
    assert (config.epochs, config.cooldown_epochs, config.optim.warmup_epochs) == (300, 0, 5)
    assert (config.augment.repeats, config.augment.mixup, config.augment.cutmix) == (3, 0.8, 1.0)
    assert (config.distill.kind, config.distill.alpha, config.distill.tau) == ("hard", 0.5, 1.0)
    assert model_info(config, Source()).preprocessing.crop_pct == 0.875


def test_the_published_decay_of_deit():
    """dist_token is decayed, cls_token and pos_embed are not."""
    config = load("deit", "deit_tiny_distilled_patch16_224")
    _, params, _ = functionalize(nnx.eval_shape(model_info(config, Source()).build))
    mask = decay_mask(params, config.optim.no_decay)
    assert (mask["dist_token"], mask["cls_token"], mask["pos_embed"]) == (True, False, False)
    assert mask["head"] == {"kernel": True, "bias": False}


@pytest.mark.parametrize("infix", ["", "_distilled"])
def test_published_fine_tuning_of_deit(infix):
    config = load("deit", f"deit_base{infix}_patch16_384")
    optim, augment = config.optim, config.augment
    assert (config.batch_size, optim.base_batch_size, config.epochs, config.cooldown_epochs) == (
        512,
        512,
        30,
        0,
    )
    assert (optim.learning_rate, optim.min_lr, optim.weight_decay) == (5e-6, 5e-6, 1e-8)
    assert (augment.mixup, augment.cutmix, augment.randaugment) == (0.8, 1.0, "rand-m9-n2-mstd0.5-inc1")
    assert (config.image_size, config.model.init_required) == ((384, 384), True)


@pytest.mark.parametrize(
    ("variant", "model", "size", "learning_rate", "drop_path"),
    [("small", "small", 224, 4e-3, 0.05), ("base", "base", 192, 3e-3, 0.2)],
)
def test_published_recipe_of_deit_iii(variant, model, size, learning_rate, drop_path):
    config = load("deit3", variant)
    optim, augment, loss = config.optim, config.augment, config.loss
    assert (config.model.name, config.image_size) == (f"deit_{model}_patch16_LS", (size, size))
    assert (config.batch_size, optim.base_batch_size, config.total_epochs) == (2048, 2048, 800)
    assert (optim.name, optim.learning_rate, optim.clip_norm) == ("lamb", learning_rate, 1.0)
    assert (optim.weight_decay, optim.warmup_epochs, optim.warmup_lr, optim.min_lr) == (0.05, 5, 1e-6, 1e-5)
    assert (loss.kind, loss.bce_threshold, loss.label_smoothing) == ("bce", 0, 0)
    assert (augment.three_augment, augment.color_jitter, augment.repeats) == (True, 0.3, 3)
    assert (augment.mixup, augment.cutmix, augment.random_erasing, augment.randaugment) == (0.8, 1.0, 0, "")
    assert config.model.options["drop_path"] == drop_path
    assert model_info(config, Source()).preprocessing.crop_pct == 1.0


def test_published_fine_tuning_of_deit_iii():
    config = load("deit3", "base_224")
    optim = config.optim
    assert (optim.name, optim.learning_rate, optim.weight_decay, optim.clip_norm) == ("adamw", 1e-5, 0.1, 0)
    assert (config.batch_size, config.epochs, config.loss.kind) == (512, 20, "cross_entropy")
    assert (config.augment.repeats, config.augment.randaugment_interpolation) == (1, "bicubic")
    assert config.model.init_required


def test_the_two_published_learning_rates_of_t2t_vit_14():
    eight, four = (load("t2t_vit", f"t2t_vit_14{end}") for end in ("", "_4gpu"))
    assert (eight.optim.learning_rate, four.optim.learning_rate) == (5e-4, 1e-3)
    assert eight.batch_size == four.batch_size == four.optim.base_batch_size == 512
    assert eight.model == four.model
    assert (eight.augment.randaugment_interpolation, eight.augment.erase_mixed) == ("random", True)
    assert load("t2t_vit", "t2t_vit_14_384").image_size == (384, 384)


def test_published_training_on_other_data_without_maps():
    config = load("lvvit_mixtoken", "lvvit_s")
    assert (config.optim.learning_rate, config.batch_size, config.optim.base_batch_size) == (1.6e-3, 512, 512)
    assert (config.total_epochs, config.ema.decay, config.loss.mixtoken) == (310, 0, True)
    assert (config.learns_patches, config.needs_maps, config.model.init_required) == (False, False, True)


def test_the_published_commands_of_lvvit_l():
    large, small = load("lvvit_l"), load("lvvit_l", "224")
    assert (large.image_size, small.image_size) == ((448, 448), (224, 224))
    assert dataclasses.replace(large, image_size=(224, 224)) == small


def test_relabel_has_one_target_for_each_image():
    config = load("relabel", "lvvit_s")
    assert (config.learns_patches, config.needs_maps) == (False, True)
    assert (config.loss.cls_target, config.loss.label_smoothing) == ("annotator", 0)
    assert load("digits", "relabel").needs_maps


def test_fine_tuning_at_a_small_batch_is_refused():
    """The peak is scaled to 1.25e-6 and min_lr is 5e-6: the learning rate would rise."""
    config = load("lvvit_finetune")
    schedule = functools.partial(make_schedule, config.optim, epochs=30, steps_per_epoch=10)
    with pytest.raises(ValueError, match=r"min_lr is 5e-06, above the peak learning rate 1.25e-06") as caught:
        schedule(batch_size=128)
    assert "config.optim.base_batch_size=128 keeps the learning rate as it is given" in str(caught.value)
    assert float(schedule(batch_size=512)(200)) == pytest.approx(5e-6)


@pytest.mark.parametrize(
    ("variant", "drop_path", "image_size"), [("s", 0.1, 512), ("m", 0.2, 512), ("l", 0.5, 448)]
)
def test_published_recipe_of_segmentation(variant, drop_path, image_size):
    config = load("upernet_lvvit", variant)
    optim, settings = config.optim, config.segmentation
    assert config.model.options["drop_path"] == drop_path
    assert (config.image_size, config.crop_size) == ((image_size, image_size), (512, 512))
    assert (optim.name, optim.learning_rate, optim.weight_decay, optim.no_decay) == ("adamw", 6e-5, 0.01, ())
    assert (optim.schedule, optim.power, optim.warmup_steps, optim.min_lr) == ("poly", 1, 1500, 0)
    assert (config.steps, config.eval.every_steps, config.checkpoint.every_steps) == (160_000, 8000, 8000)
    assert (optim.clip_norm, config.ema.decay, config.augment.hflip) == (0, 0, 0.5)
    assert (settings.scale, settings.scale_range, settings.max_class_ratio) == ((2048, 512), (0.5, 2), 0.75)
    assert (settings.normalize, settings.aux_weight, settings.photometric) == ("all", 0.4, True)
    assert (settings.num_classes, settings.reduce_zero_label) == (150, True)
    preprocessing = model_info(config, Source()).preprocessing
    assert (preprocessing.scale, preprocessing.window, preprocessing.stride) == ((2048, 512), 512, 341)


def test_published_fine_tuning():
    config = load("lvvit_finetune", "lvvit_m")
    optim = config.optim
    assert (optim.learning_rate, optim.min_lr, optim.weight_decay) == (5e-6, 5e-6, 1e-8)
    assert (config.model.options["drop_path"], config.token_labels) == (0.2, True)
    assert config.model.init_required
    assert model_info(config, Source()).preprocessing.crop_pct == published_crop_pct("lvvit_m") == 1.0
    assert parse_image_size(config.image_size) == (384, 384)


@pytest.mark.parametrize(
    "name",
    ["digits", "lvvit_folder", "lvvit_finetune", "lvvit_l", "lvvit_mixtoken", "deit", "deit3", "relabel",
     "t2t_vit", "upernet_lvvit"],
)  # fmt: skip
def test_an_unknown_variant_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}:nonsense is not a variant of {name}; choose one of "):
        load(name, "nonsense")


def test_published_schedule_at_known_epochs():
    config = load("lvvit_s")
    schedule = make_schedule(config.optim, epochs=config.epochs, steps_per_epoch=1, batch_size=1024)
    assert float(schedule(0)) == pytest.approx(1e-6)
    assert float(schedule(150)) == pytest.approx((1.6e-3 + 1e-5) / 2)
    assert float(schedule(300)) == float(schedule(309)) == pytest.approx(1e-5)


def test_the_published_transfer_of_t2t_vit():
    """SGD without Nesterov, two learning rates that end at 2e-4, and decay of all that is trained."""
    config = load("transfer", "cifar100")
    optim, augment = config.optim, config.augment
    assert (optim.name, optim.learning_rate, optim.min_lr, optim.weight_decay) == (
        "momentum",
        0.05,
        2e-4,
        5e-4,
    )
    assert (config.batch_size, config.epochs, config.total_epochs, optim.warmup_epochs) == (64, 60, 60, 0)
    assert (augment.crop, augment.crop_padding, augment.hflip, augment.randaugment) == ("padded", 28, 0.5, "")
    info = model_info(config, Source())
    assert info.preprocessing.mean == (0.4914, 0.4822, 0.4465)
    assert (info.preprocessing.crop_pct, info.preprocessing.interpolation) == (1.0, "bilinear")
    _, params, _ = functionalize(nnx.eval_shape(info.build))
    factors = learning_rate_factors(params, optim.lr_scale)
    assert set(jax.tree.leaves([factors["tokens_to_token"], factors["blocks"]])) == {0.01}
    assert set(jax.tree.leaves([factors["cls_token"], factors["norm"]])) == {0.0}
    assert set(jax.tree.leaves(factors["head"])) == {1.0}
    assert all(jax.tree.leaves(decay_mask(params, optim.no_decay)))


def test_the_transfer_of_deit():
    cars, inat = load("transfer", "deit_cars"), load("transfer", "deit_inat2018")
    assert (cars.data.name, cars.optim.name, cars.optim.learning_rate, cars.epochs) == (
        "cars196",
        "sgd",
        0.01,
        1000,
    )
    assert (cars.augment.random_erasing, cars.model.options["drop_path"]) == (0.0, 0.0)
    assert (inat.optim.name, inat.optim.learning_rate, inat.optim.base_batch_size) == ("adamw", 7.5e-5, 768)
    assert (inat.augment.random_erasing, inat.model.options["drop_path"], inat.epochs) == (0.1, 0.1, 360)
