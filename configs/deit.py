"""DeiT on ImageNet (Touvron et al. 2021, arXiv:2012.12877): labels, mixup, cutmix, optionally a teacher.

    python -m tlvit.main --config=configs/deit.py --workdir=/runs/deit_small
    python -m tlvit.main --config=configs/deit.py:deit_tiny_distilled_patch16_224 --workdir=/runs/deit_tiny \\
        --config.distill.teacher=regnety_160.pth

The variant after the colon is the name of a DeiT for 224 pixels; the distilled ones need a teacher. The
published loop runs its schedule one epoch late: --config.optim.lag_epochs=1 reproduces that.

Hardware: 8 GPUs or a TPU v5e-8 at batch 1024. Published top-1 after 300 epochs: 72.2, 79.9 and 81.8 % (tiny,
small, base); with a RegNetY-16GF as teacher 74.5, 81.2 and 83.4 %. Measured with tlvit: nothing yet.
"""

from tlvit.config import check_variant, default

VARIANTS = tuple(
    f"deit_{size}{infix}_patch16_224" for size in ("tiny", "small", "base") for infix in ("", "_distilled")
)


def get_config(variant: str = "deit_small_patch16_224"):
    check_variant("deit", variant, VARIANTS)
    config = default()
    config.token_labels = False
    config.cooldown_epochs = 0
    config.model.name = variant
    config.model.options.drop_path = 0.1
    config.augment.repeats = 3
    config.augment.interpolation = "bicubic"
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.optim.learning_rate = 5e-4
    config.optim.base_batch_size = 512
    config.ema.decay = 0.99996
    return config
