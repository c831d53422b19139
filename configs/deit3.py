"""DeiT III on ImageNet (Touvron et al. 2022, arXiv:2204.07118): a plain ViT with a modern recipe.

    python -m tlvit.main --config=configs/deit3.py --workdir=/runs/deit3_small
    python -m tlvit.main --config=configs/deit3.py:base --workdir=/runs/deit3_base_192
    python -m tlvit.main --config=configs/deit3.py:base_224 --workdir=/runs/deit3_base \\
        --config.model.init_from=/runs/deit3_base_192

LayerScale, 3-Augment with color jitter, binary cross entropy over all classes of a mixed image, and LAMB,
whose implementation clips the gradient at a norm of 1. Variants: small (at 224 pixels), base (at 192 pixels,
which base_224 fine-tunes at 224), and small_384 (fine-tunes small at 384). With ImageNet-21k the paper
replaces the random resized crop by a simple random crop: --config.augment.crop=padded
--config.augment.padding_mode=reflect.

Hardware: 16 or more GPUs or a TPU v5e-16 at batch 2048; fewer with --config.optim.accumulate=N. Published
top-1 after 800 epochs: 81.4 % (small), 83.8 % (base after fine-tuning at 224), 83.4 % (small_384). Measured
with tlvit: nothing yet.
"""

from tlvit.config import check_variant, default

PRETRAINING = {  # image size, learning rate, drop path
    "small": (224, 4e-3, 0.05),
    "base": (192, 3e-3, 0.2),
}
FINE_TUNING = {  # image size, drop path
    "base_224": (224, 0.2),
    "small_384": (384, 0.0),
}
VARIANTS = (*PRETRAINING, *FINE_TUNING)


def get_config(variant: str = "small"):
    check_variant("deit3", variant, VARIANTS)
    config = default()
    config.token_labels = False
    config.cooldown_epochs = 0
    config.model.name = f"deit_{variant.split('_')[0]}_patch16_LS"
    config.augment.interpolation = "bicubic"
    config.augment.random_erasing = 0.0
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.ema.decay = 0.99996
    if variant in PRETRAINING:
        size, learning_rate, drop_path = PRETRAINING[variant]
        config.batch_size = config.optim.base_batch_size = 2048
        config.epochs = 800
        config.augment.randaugment = ""
        config.augment.three_augment = True
        config.augment.color_jitter = 0.3
        config.augment.repeats = 3
        config.loss.kind = "bce"
        config.loss.label_smoothing = 0.0
        config.optim.name = "lamb"
        config.optim.learning_rate = learning_rate
        config.optim.clip_norm = 1.0
    else:
        size, drop_path = FINE_TUNING[variant]
        config.batch_size = config.optim.base_batch_size = 512
        config.epochs = 20
        config.model.init_required = True
        config.augment.randaugment_interpolation = "bicubic"
        config.optim.learning_rate = 1e-5
        config.optim.weight_decay = 0.1
    config.image_size = (size, size)
    config.model.options.drop_path = drop_path
    return config
