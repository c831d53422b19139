"""The table at the start of a run."""

import logging
import re

import optax

from configs import deit, lvvit_mixtoken, lvvit_s, relabel, t2t_vit
from tlvit.config import resolve
from tlvit.training.mesh import make_mesh
from tlvit.training.run_data import RunData, model_info
from tlvit.training.run_summary import print_summary
from tlvit.training.state import abstract_model, init_state


class Maps:
    """The attributes of score maps that the summary reads."""

    class info:
        num_images, num_missing, grid, top_k, annotator = 100, 3, (18, 18), 5, "dm_nfnet_f6"


class Source:
    """The attributes of a source that the summary reads."""

    num_examples, num_classes, identity, class_names = 100, 1000, "imagenet2012:train", None


def summary(config, maps, caplog):
    """Label -> text of the summary of a new run of 8 steps."""
    config.model.options.update({"dim": 16, "depth": 1, "num_heads": 2})
    config = resolve(config)
    info, mesh = model_info(config, Source()), make_mesh()
    net, *_ = abstract_model(info.build)
    state = init_state(info.build, optax.sgd(0.1), mesh=mesh)
    with caplog.at_level(logging.INFO, "tlvit"):
        print_summary(config, RunData(Source(), Source(), maps), mesh, net, state, 8)
    return dict(r.getMessage().split("  ", 1) for r in caplog.records)


def test_with_token_labels(caplog):
    config = lvvit_s.get_config()
    found = {k: v.strip() for k, v in summary(config, Maps, caplog).items()}
    assert list(found) == [
        "devices", "model", "state", "train images", "eval images", "token labels", "augmentation",
        "schedule", "start",
    ]  # fmt: skip
    assert found["devices"] == "8 x cpu (cpu), mesh data 8"
    assert found["model"].startswith("lvvit_s, 0.")
    assert found["model"].endswith("G MACs, bfloat16")
    state = r"(\d\.\d) of \1 MB on each device \(parameters, optimizer and average\)"
    assert re.fullmatch(state, found["state"])
    assert found["train images"] == "100 of 1000 classes, imagenet2012:train"
    assert found["token labels"] == (
        "ON: 97 maps of 18x18 cells, top 5, for 100 images, by dm_nfnet_f6, crop aligned, class token learns "
        "the annotator target"
    )
    assert found["augmentation"] == (
        "crop 0.08-1, random resize to 224x224, flip 0.5, rand-m9-n2-mstd0.5-inc1 on the host, "
        "random erasing 0.25, MixToken"
    )
    assert found["schedule"] == (
        "300 + 10 epochs = 8 steps of 1024 images (cosine + cooldown); peak learning rate 1.60e-03 (0.0016 "
        "for batch 1024), changes every epoch"
    )
    assert found["start"] == "new weights"


def test_without_token_labels(caplog):
    config = deit.get_config()
    config.model.init_from = "weights.pth"
    config.optim.lr_scale = {"*": 0, "blocks/0/norm?/*": 0.1, "head/bias": 1}
    found = {k: v.strip() for k, v in summary(config, None, caplog).items()}
    assert found["token labels"] == "OFF: trained on the labels of the images"
    assert found["augmentation"].startswith("3 views of an image, crop 0.08-1, bicubic resize")
    assert found["augmentation"].endswith("mixup 0.8, cutmix 1")
    size = r"0\.0\d M parameters"
    times = "times the learning rate"
    assert re.fullmatch(f"{size} frozen, {size} at 0.1 {times}, {size} at 1 {times}", found["lr scale"])
    assert "MixToken" not in found["augmentation"]
    assert found["start"] == "weights of weights.pth"


def test_the_published_order_of_the_augmentations(caplog):
    config = lvvit_s.get_config()
    config.augment.order = "published"
    config.augment.randaugment_interpolation = "random"
    text = summary(config, Maps, caplog)["augmentation"].strip()
    assert text == (
        "flip 0.5, random rand-m9-n2-mstd0.5-inc1 on the whole image, crop 0.08-1, random resize to 224x224, "
        "random erasing 0.25, MixToken"
    )


def test_erasing_of_mixed_images(caplog):
    config = t2t_vit.get_config()
    text = summary(config, None, caplog)["augmentation"]
    assert text.endswith(
        "random rand-m9-n2-mstd0.5-inc1 on the host, mixup 0.8, cutmix 1, random erasing 0.25"
    )


def test_only_the_class_token_learns(caplog):
    found = summary(relabel.get_config("lvvit_s"), Maps, caplog)
    assert found["token labels"].endswith("only the class token learns: it learns the annotator target")
    assert found["augmentation"].endswith("mixup 0.8, cutmix 1")
    config = lvvit_mixtoken.get_config()
    caplog.clear()
    found = summary(config, None, caplog)
    assert found["token labels"].strip() == "OFF: trained on the labels of the images"
    assert found["augmentation"].endswith("random erasing 0.25, MixToken")


def test_other_augmentations_are_named_by_their_settings(caplog):
    config = deit.get_config()
    config.augment.antialias = True
    config.augment.crop_ratio = (1.0, 1.0)
    text = summary(config, None, caplog)["augmentation"]
    assert text.endswith("cutmix 1, crop_ratio (1.0, 1.0), antialias True")
