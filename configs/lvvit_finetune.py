"""Fine-tunes an LV-ViT at a larger image size with token labels (Jiang et al. 2021, arXiv:2104.10858).

    python -m tlvit.main --config=configs/lvvit_finetune.py:lvvit_s --workdir=/runs/lvvit_s_384 \\
        --config.model.init_from=/runs/lvvit_s --config.data.score_maps=/data/score_maps

The variant after the colon is lvvit_s, lvvit_m or lvvit_l. The image size is 384 (L: 512); another one is set
with --config.image_size=448. Position embeddings are resized, and the token labels are sampled on the
larger token grid from the same score maps. The learning rate is scaled with the batch size and min_lr is not,
so a smaller batch is refused: --config.batch_size=128 --config.optim.base_batch_size=128 keeps both at 5e-6.
The published command has no moving average: --config.ema.decay=0.

Hardware: as for the model's own recipe. Published top-1 at batch 512: 84.4 % (S at 384), 85.4 and 85.5 % (M
at 384 and 448), 86.4 % (L at 512, from 448). The published command names no number of epochs; this recipe
uses 30. Measured with tlvit: nothing yet.
"""

from tlvit.config import check_variant, default

DROP_PATH = {"lvvit_s": 0.1, "lvvit_m": 0.2, "lvvit_l": 0.3}  # as in training


def get_config(variant: str = "lvvit_s"):
    check_variant("lvvit_finetune", variant, DROP_PATH)
    config = default()
    config.image_size = (512, 512) if variant == "lvvit_l" else (384, 384)
    config.batch_size = 512
    config.epochs = 30
    config.cooldown_epochs = 0
    config.model.name = variant
    config.model.init_required = True
    config.model.options.drop_path = DROP_PATH[variant]
    config.optim.learning_rate = 5e-6
    config.optim.min_lr = 5e-6
    config.optim.base_batch_size = 512
    config.optim.weight_decay = 1e-8
    if variant == "lvvit_l":
        config.model.options.remat = True
        config.augment.randaugment = "rand-m9-n3-mstd0.5-inc1"
    return config
