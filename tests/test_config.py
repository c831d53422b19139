"""Settings: defaults, ranges, exclusions, and the way from a ConfigDict to Config and back."""

import dataclasses
import json
import math

import pytest

from tlvit.config import (
    Augment,
    Config,
    Data,
    Loss,
    check_variant,
    default,
    parse_image_size,
    resolve,
    settings,
    to_dict,
)
from tlvit.recipes import override


def changed(name, value):
    """The default settings with one of them changed, as a recipe or flag does."""
    config = default()
    config.update_from_flattened_dict({name: value})
    return config


def test_defaults_survive_the_round_trip():
    assert resolve(default()) == Config()
    assert resolve(json.loads(json.dumps(to_dict(Config())))) == Config()
    assert resolve({}) == Config()


def test_a_change_arrives_in_its_section():
    config = resolve(changed("optim.min_lr", 2e-5))
    assert config.optim.min_lr == 2e-5
    assert dataclasses.replace(config, optim=Config().optim) == Config()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.dtype", "float16", "config.model.dtype must be float32 or bfloat16, not 'float16'"),
        ("data.label_crop", "left", "config.data.label_crop must be aligned or published, not 'left'"),
        ("loss.cls_target", "half", "config.loss.cls_target must be annotator or .*label, not 'half'"),
        ("augment.interpolation", "cubic", "must be bilinear or bicubic or random, not 'cubic'"),
        ("augment.crop_scale", (1.5, 2.0), "config.augment.crop_scale must be at most 1, not 1.5"),
        ("augment.crop_scale", (0.0, 0.5), "config.augment.crop_scale must be above 0, not 0.0"),
        (
            "augment.crop_ratio",
            (2.0, 1.0),
            r"crop_ratio must be \(low, high\) with low <= high, not \(2.0, 1.0\)",
        ),
        ("augment.crop_ratio", (1.0, 1.5, 2.0), r"crop_ratio must be \(low, high\)"),
        ("eval.crop_pct", 1.5, "config.eval.crop_pct must be at most 1, not 1.5"),
        ("log_every", 0, "config.log_every must be at least 1, not 0"),
        ("augment.hflip", 2.0, "config.augment.hflip must be at most 1, not 2.0"),
        ("ema.decay", math.nan, "config.ema.decay must be a finite number, not nan"),
        ("optim.learning_rate", -1.0, "config.optim.learning_rate must be at least 0, not -1.0"),
        ("optim.learning_rate", math.inf, "config.optim.learning_rate must be a finite number, not inf"),
        ("optim.schedule_unit", "week", "config.optim.schedule_unit must be epoch or step, not 'week'"),
        (
            "optim.warmup_steps",
            9,
            "config.optim.warmup_steps is 9, but the learning rate is updated once an "
            "epoch. Set config.optim.schedule_unit=step.",
        ),
        ("distill.tau", 0.0, "config.distill.tau must be above 0, not 0.0"),
        ("epochs", 0, "config.epochs must be at least 1, not 0"),
        ("mesh.data", -2, "config.mesh.data must be at least -1, not -2"),
        ("seed", 2**32, "config.seed must be at most 4294967295, not 4294967296"),
        ("epochs", 10**9, "config.epochs must be at most 100000, not 1000000000"),
        ("batch_size", 10**6, "config.batch_size must be at most 131072, not 1000000"),
        ("data.threads", 100_000, "config.data.threads must be at most 1024, not 100000"),
        ("data.shuffle_gib", math.inf, "config.data.shuffle_gib must be a finite number, not inf"),
        ("augment.color_jitter", math.inf, "config.augment.color_jitter must be a finite number, not inf"),
        ("loss.dense_weight", math.nan, "config.loss.dense_weight must be a finite number, not nan"),
        ("ema.decay", 1.0, "config.ema.decay must be below 1, not 1.0"),
        ("image_size", (0, 5), "An image size is one number or HEIGHTxWIDTH"),
        ("image_size", (224, 80_000), "An image size is at most 4096 pixels, not 80000"),
        ("optim.min_lr", 1.0, r"config.optim.min_lr is 1, above the peak, config.optim.learning_rate=0.0016"),
    ],
)
def test_values_out_of_range_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        resolve(changed(name, value))


def test_unknown_settings_are_refused_with_the_closest_name():
    with pytest.raises(
        ValueError,
        match=r"config.optim.learning_rat is not a setting; did you mean config.optim.learning_rate",
    ):
        resolve({"optim": {"learning_rat": 1.0}})
    with pytest.raises(ValueError, match=r"config.xyz is not a setting; known: seed, batch_size"):
        resolve({"xyz": 1})


def test_settings_that_exclude_each_other():
    for name in ("mixup", "cutmix"):
        with pytest.raises(ValueError, match=r"config.token_labels excludes mixup \(0.*\) and cutmix"):
            Config(augment=Augment(**{name: 0.8}))
        Config(augment=Augment(**{name: 0.8}), token_labels=False)
    with pytest.raises(ValueError, match="all off: a vision transformer overfits on labels alone"):
        Config(token_labels=False)
    Config(token_labels=False, loss=Loss(plain_labels=True))
    config = default()
    config.distill.teacher = "teacher.pth"
    with pytest.raises(ValueError, match="two recipes"):
        resolve(config)


def test_an_annotator_takes_the_place_of_score_maps():
    for changes, message in (
        (
            {"annotator": "a", "score_maps": "m"},
            "score_maps is m and config.data.annotator is a: token labels",
        ),
        ({"annotator": "a", "label_crop": "published"}, "labels of config.data.annotator are always aligned"),
        ({"annotator_image_size": "64"}, "annotator_image_size is set, but config.data.annotator is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve({"data": changes})
    with pytest.raises(ValueError, match=r"annotator is a, but config.token_labels is off"):
        resolve({"data": {"annotator": "a"}, "token_labels": False, "loss": {"plain_labels": True}})
    found = resolve({"data": {"annotator": "a", "annotator_image_size": "64x96"}}).data
    assert (found.annotator, found.annotator_image_size) == ("a", (64, 96))


def test_every_setting_is_listed_once_with_its_meaning():
    rows = settings()
    names = [name for name, *_ in rows]
    assert len(set(names)) == len(names)
    flat = {}
    for key, value in to_dict(Config()).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            flat[key] = value
    assert {name: value for name, value, *_ in rows} == flat
    assert all(meaning.endswith(".") and len(meaning) > 10 for *_, meaning in rows)
    ranges = {name: text for name, _, text, _ in rows}
    assert ranges["augment.crop_scale"] == "> 0, <= 1"
    assert ranges["optim.schedule_unit"] == "epoch | step"


@pytest.mark.parametrize(
    ("size", "pair"),
    [(224, (224, 224)), ("224", (224, 224)), ("384x256", (384, 256)), ((96, 64), (96, 64)), ([48], (48, 48))],
)
def test_image_sizes(size, pair):
    assert parse_image_size(size) == pair


@pytest.mark.parametrize("size", ["large", "1x2x3", 0, (-1, 5), "", ()])
def test_image_sizes_that_are_not(size):
    with pytest.raises(ValueError, match="HEIGHTxWIDTH, not "):
        parse_image_size(size)


def test_one_number_means_a_square():
    config = default()
    config.image_size = (96,)  # what --config.image_size=96 gives
    assert resolve(config).image_size == (96, 96)


def test_variants():
    check_variant("digits", "annotator", ("token_labels", "annotator"))
    with pytest.raises(
        ValueError, match="digits:x is not a variant of digits; choose one of token_labels, annotator"
    ):
        check_variant("digits", "x", ("token_labels", "annotator"))


def test_values_of_another_type_are_refused():
    for section, message in (
        ({"batch_size": "x"}, "config.batch_size must be an integer, not 'x'"),
        ({"batch_size": 4.0}, "config.batch_size must be an integer, not 4.0"),
        ({"token_labels": 1}, "config.token_labels must be true or false, not 1"),
        ({"optim": {"learning_rate": "fast"}}, "config.optim.learning_rate must be a number, not 'fast'"),
        ({"optim": 3}, "config.optim must be a section of settings, not 3"),
        ({"model": {"name": None}}, "config.model.name must be text, not null"),
        ({"model": {"options": []}}, r"config.model.options must be an object, not \(\)"),
        ({"image_size": 96.5}, "An image size is one number"),
        ({"eval": {"image_size": [96, 96, 96]}}, "An image size is one number"),
        ({"augment": {"crop_scale": 0.5}}, "crop_scale must be \\(low, high\\)"),
        ({3: 4}, "config.3 is not a setting"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(section)


def test_losses_that_teach_nothing():
    with pytest.raises(ValueError, match=r"dense_weight and config.loss.cls_weight are both 0"):
        Config(loss=Loss(dense_weight=0, cls_weight=0))
    with pytest.raises(ValueError, match=r"cls_weight is 0 and config.token_labels is off"):
        Config(token_labels=False, loss=Loss(cls_weight=0, plain_labels=True))
    Config(loss=Loss(dense_weight=0))


def test_binary_cross_entropy_is_for_image_labels_without_smoothing():
    bce = {"kind": "bce", "plain_labels": True}
    with pytest.raises(ValueError, match=r'kind="bce" is for image labels, but config.token_labels is set'):
        Config(loss=Loss(kind="bce"))
    with pytest.raises(ValueError, match=r"label_smoothing=0.1 makes every target positive"):
        Config(token_labels=False, loss=Loss(**bce))
    Config(token_labels=False, loss=Loss(**bce, label_smoothing=0))
    Config(token_labels=False, loss=Loss(**bce, bce_threshold=0.2))


def test_padded_crops():
    with pytest.raises(ValueError, match=r"crop_padding=32 mirrors more than an image of 32x48 pixels has"):
        Config(image_size=(32, 48), augment=Augment(crop="padded", crop_padding=32, padding_mode="reflect"))
    Config(image_size=(32, 48), augment=Augment(crop="padded", crop_padding=32))
    with pytest.raises(ValueError, match=r"label_crop=published belongs to random resized crops"):
        Config(augment=Augment(crop="padded"), data=Data(label_crop="published"))


def test_channel_statistics_are_three_numbers():
    with pytest.raises(ValueError, match=r"config.data.mean must be three numbers, not \(0.5,\)"):
        Data(mean=(0.5,))
    with pytest.raises(ValueError, match=r"config.data.std must be above 0, not 0"):
        Data(std=(0.2, 0, 0.2))
    config = default()
    override(config, "data.mean", "(0.4914, 0.4822, 0.4465)")
    assert resolve(config).data.mean == (0.4914, 0.4822, 0.4465)


def test_what_learns_from_score_maps():
    """The patch tokens with their weight, and the class token unless its target is the label."""
    tokens, pooled = Config(), Config(loss=Loss(dense_weight=0))
    assert (tokens.learns_patches, tokens.needs_maps) == (True, True)
    assert (pooled.learns_patches, pooled.needs_maps) == (False, True)
    labels = Config(loss=Loss(dense_weight=0, cls_target="label"))
    assert (labels.learns_patches, labels.needs_maps) == (False, False)
    off = Config(token_labels=False, loss=Loss(plain_labels=True))
    assert (off.learns_patches, off.needs_maps) == (False, False)
    with pytest.raises(ValueError, match="annotator is a, but nothing learns from it"):
        dataclasses.replace(labels, data=Data(annotator="a"))


def test_one_way_of_mixing_with_pooled_targets():
    Config(loss=Loss(dense_weight=0, mixtoken=False), augment=Augment(cutmix=1.0))
    with pytest.raises(ValueError, match=r"config.loss.mixtoken and mixup \(0\) or cutmix \(1\) would both"):
        Config(loss=Loss(dense_weight=0), augment=Augment(cutmix=1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "published", "randaugment_on": "device"}, "augment.order=published is for RandAugment on"),
        (
            {"randaugment_interpolation": "bicubic", "randaugment_on": "device"},
            "randaugment_interpolation=bicubic is for RandAugment on the host",
        ),
        ({"order": "published", "crop": "padded"}, "order=published takes a random resized crop"),
    ],
)
def test_augmentations_that_exclude_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(augment=Augment(**changes))
    if "randaugment_on" in changes:
        Config(augment=Augment(randaugment="", **changes))
