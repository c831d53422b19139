"""LV-ViT-L on ImageNet at 448, trained with token labels (Jiang et al. 2021, arXiv:2104.10858).

    python -m tlvit.main --config=configs/lvvit_l.py --workdir=/runs/lvvit_l \\
        --config.data.score_maps=/data/score_maps/imagenet2012-train

Published: 86.2 % top-1 at 448 (150.5 M parameters, 157 G multiply-adds). Batch 1024 needs a pod, or on fewer
chips --config.optim.accumulate=N. Blocks are recomputed in the backward pass (remat) to save memory. Not yet
trained here.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.image_size = (448, 448)
    config.model.name = "lvvit_l"
    config.model.options.drop_path = 0.3
    config.model.options.remat = True
    config.augment.randaugment = "rand-m9-n3-mstd0.5-inc1"
    config.optim.learning_rate = 1e-3
    config.eval.crop_pct = 1.0
    return config
