"""T2T-ViT on ImageNet at 224 (Yuan et al. 2021, arXiv:2101.11986): image labels, mixup and cutmix.

    python -m tlvit.main --config=configs/t2t_vit.py --workdir=/runs/t2t_vit_14
    python -m tlvit.main --config=configs/t2t_vit.py:t2t_vit_7 --workdir=/runs/t2t_vit_7

The name of any T2T-ViT comes after the colon. Published top-1: 71.7, 75.2, 76.5 % (7, 10, 12), 81.5, 81.9,
82.3 % (14, 19, 24), 81.7, 82.4, 82.6 % (t_14, t_19, t_24); 310 epochs at batch 512. Not yet trained here.

With token labels instead (published for t2t_vit_24: 84.2 %, without its settings), T2T-ViT gets a token head:
--config.token_labels=True --config.model.options.token_head=True --config.augment.mixup=0.0
--config.augment.cutmix=0.0 --config.data.score_maps=DIR
"""

from configs import common
from tlvit.models.t2t_vit import VARIANTS

SMALL = ("t2t_vit_7", "t2t_vit_10", "t2t_vit_12")
WEIGHT_DECAY = {"19": 0.065, "24": 0.065}  # by the depth in the name


def get_config(model: str = "t2t_vit_14"):
    if model not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise ValueError(f"configs/t2t_vit.py:{model} is unknown; after the colon comes one of {known}.")
    config = common.get_config()
    config.token_labels = False
    config.batch_size = 512
    config.model.name = model
    config.model.options.drop_path = 0.1
    config.model.options.token_head = False
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.optim.learning_rate = 1e-3 if model in SMALL else 5e-4
    config.optim.reference_batch = 512
    config.optim.weight_decay = 0.03 if model in SMALL else WEIGHT_DECAY.get(model.rpartition("_")[2], 0.05)
    config.optim.warmup_epochs = 10.0
    config.ema.decay = 0.99996
    return config
