"""LV-ViT-T on ImageNet at 224 pixels with token labels (Jiang et al. 2021, arXiv:2104.10858).

    python -m tlvit.main --config=configs/lvvit_t.py --workdir=/runs/lvvit_t \\
        --config.data.score_maps=/data/score_maps

Hardware: 8 GPUs or a TPU v5e-8 at batch 1024. Published: 79.1 % top-1 (8.5 M parameters, 2.9 G multiply-adds)
after 310 epochs. Measured with tlvit: nothing yet.
"""

from tlvit.config import default


def get_config():
    config = default()
    config.model.name = "lvvit_t"
    config.model.options.drop_path = 0.1
    return config
