"""LV-ViT-S on ImageNet at 224, trained with token labels (Jiang et al. 2021, arXiv:2104.10858).

    python -m tlvit.main --config=configs/lvvit_s.py --workdir=/runs/lvvit_s \\
        --config.data.score_maps=/data/score_maps/imagenet2012-train

Published: 83.3 % top-1 (26.2 M parameters, 6.6 G multiply-adds), 310 epochs on 8 GPUs at batch 1024. Not yet
trained here.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.model.name = "lvvit_s"
    config.model.options.drop_path = 0.1
    return config
