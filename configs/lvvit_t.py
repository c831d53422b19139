"""LV-ViT-T on ImageNet at 224, trained with token labels (Jiang et al. 2021, arXiv:2104.10858).

    python -m tlvit.main --config=configs/lvvit_t.py --workdir=/runs/lvvit_t \\
        --config.data.score_maps=/data/score_maps/imagenet2012-train

Published: 79.1 % top-1 (8.5 M parameters, 2.9 G multiply-adds), 310 epochs on 8 GPUs at batch 1024. Not yet
trained here.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.model.name = "lvvit_t"
    config.model.options.drop_path = 0.1
    return config
