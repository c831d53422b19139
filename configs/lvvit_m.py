"""LV-ViT-M on ImageNet at 224 pixels with token labels (Jiang et al. 2021, arXiv:2104.10858).

    python -m tlvit.main --config=configs/lvvit_m.py --workdir=/runs/lvvit_m \\
        --config.data.score_maps=/data/score_maps

Hardware: 8 GPUs or a TPU v5e-8 at batch 1024. Published: 84.0 % top-1 (55.8 M parameters, 12.7 G
multiply-adds) after 310 epochs. Measured with tlvit: nothing yet.
"""

from tlvit.config import default


def get_config():
    config = default()
    config.model.name = "lvvit_m"
    config.model.options.drop_path = 0.2
    return config
