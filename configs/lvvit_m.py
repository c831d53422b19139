"""LV-ViT-M on ImageNet at 224, trained with token labels (Jiang et al. 2021, arXiv:2104.10858).

    python -m tlvit.main --config=configs/lvvit_m.py --workdir=/runs/lvvit_m \\
        --config.data.score_maps=/data/score_maps/imagenet2012-train

Published: 84.0 % top-1 (55.8 M parameters, 12.7 G multiply-adds), 310 epochs on 8 GPUs at batch 1024. Not yet
trained here.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.model.name = "lvvit_m"
    config.model.options.drop_path = 0.2
    config.eval.crop_pct = 1.0
    return config
