"""DeiT on ImageNet (Touvron et al. 2021, arXiv:2012.12877): labels, mixup, cutmix; optionally a teacher.

    python -m tlvit.main --config=configs/deit.py --workdir=/runs/deit_small
    python -m tlvit.main --config=configs/deit.py:deit_tiny_distilled_patch16_224 --workdir=/runs/deit_tiny \\
        --config.distill.teacher=regnety_160.pth

The name of any DeiT for 224 pixels comes after the colon; the distilled ones need a teacher. Published
top-1: 72.2, 79.9, 81.8 % (tiny, small, base), with a RegNetY-16GF as teacher 74.5, 81.2, 83.4 %; 300 epochs
at batch 1024. The published loop runs its schedule one epoch late: --config.optim.lag_epochs=1. Not yet
trained here.
"""

from configs import common
from tlvit.models.deit import VARIANTS

ARMS = tuple(name for name in VARIANTS if name.endswith("_224"))


def get_config(model: str = "deit_small_patch16_224"):
    if model not in ARMS:
        raise ValueError(
            f"configs/deit.py:{model} is unknown; after the colon comes one of {', '.join(ARMS)}."
        )
    config = common.get_config()
    config.token_labels = False
    config.floor_epochs = 0
    config.model.name = model
    config.model.options.drop_path = 0.1
    config.augment.repeats = 3
    config.augment.interpolation = "bicubic"
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.optim.learning_rate = 5e-4
    config.optim.reference_batch = 512
    config.ema.decay = 0.99996
    config.eval.crop_pct = 0.875
    return config
