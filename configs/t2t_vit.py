"""T2T-ViT on ImageNet at 224 pixels (Yuan et al. 2021, arXiv:2101.11986): image labels, mixup and cutmix.

    python -m tlvit.main --config=configs/t2t_vit.py --workdir=/runs/t2t_vit_14
    python -m tlvit.main --config=configs/t2t_vit.py:t2t_vit_7 --workdir=/runs/t2t_vit_7
    python -m tlvit.main --config=configs/t2t_vit.py:t2t_vit_14_384 --workdir=/runs/t2t_vit_14_384

The variant after the colon is the name of a T2T-ViT. t2t_vit_14_384 trains at 384 pixels from new weights.
Two learning rates were published for T2T-ViT-14, both for a batch of 512 images: 5e-4 in the command for 8
GPUs, which is that of t2t_vit_14 and t2t_vit_t_14, and 1e-3 in the one for 4 GPUs: t2t_vit_14_4gpu and
t2t_vit_t_14_4gpu.

With token labels, T2T-ViT gets a token head: --config.token_labels=True
--config.model.options.token_head=True --config.augment.mixup=0.0 --config.augment.cutmix=0.0
--config.data.score_maps=DIR

Hardware: 8 GPUs or a TPU v5e-8 at batch 512. Published top-1 after 310 epochs: 71.7, 75.2, 76.5 % (7, 10,
12); 81.5, 81.9, 82.3 % (14, 19, 24); 81.7, 82.4, 82.6 % (t_14, t_19, t_24); 83.3 % (14 at 384); with token
labels 84.2 % (24; the settings of this run were not published). Measured with tlvit: nothing yet.
"""

from tlvit.config import check_variant, default

SMALL = ("t2t_vit_7", "t2t_vit_10", "t2t_vit_12")
FOUR_GPUS = "_4gpu"  # the end of variants with the learning rate of the command for 4 GPUs
VARIANTS = (
    *SMALL,
    *("t2t_vit_14", "t2t_vit_19", "t2t_vit_24", "t2t_vit_t_14", "t2t_vit_t_19", "t2t_vit_t_24"),
    *("t2t_vit_14_resnext", "t2t_vit_14_wide", "t2t_vit_14_se", "t2t_vit_16_ghost", "t2t_vit_dense"),
    *("t2t_vit_14_384", "t2t_vit_14_4gpu", "t2t_vit_t_14_4gpu"),
)
DEEP_WEIGHT_DECAY = 0.065  # T2T-ViT-19 and -24


def get_config(variant: str = "t2t_vit_14"):
    check_variant("t2t_vit", variant, VARIANTS)
    config = default()
    config.token_labels = False
    config.batch_size = 512
    config.model.name = variant.removesuffix(FOUR_GPUS).removesuffix("_384")
    config.model.options.drop_path = 0.1
    config.model.options.token_head = False
    config.augment.randaugment_interpolation = "random"
    config.augment.erase_mixed = True
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.optim.learning_rate = 1e-3 if variant in SMALL or variant.endswith(FOUR_GPUS) else 5e-4
    config.optim.base_batch_size = 512
    config.optim.warmup_epochs = 10.0
    if variant in SMALL:
        config.optim.weight_decay = 0.03
    elif variant.endswith(("_19", "_24")):
        config.optim.weight_decay = DEEP_WEIGHT_DECAY
    config.ema.decay = 0.99996
    if variant.endswith("_384"):
        config.image_size = (384, 384)
    return config
