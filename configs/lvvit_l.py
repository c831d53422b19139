"""LV-ViT-L on ImageNet at 448 pixels with token labels (Jiang et al. 2021, arXiv:2104.10858).

    python -m tlvit.main --config=configs/lvvit_l.py --workdir=/runs/lvvit_l \\
        --config.data.score_maps=/data/score_maps

Hardware: 16 or more accelerators of 16 GB at batch 1024; fewer with --config.optim.accumulate=N, which runs a
batch in N parts. The blocks are recomputed in the backward pass (remat) to save memory. Published: 86.2 %
top-1 (150.5 M parameters, 157 G multiply-adds). Measured with tlvit: nothing yet.
"""

from tlvit.config import default


def get_config():
    config = default()
    config.image_size = (448, 448)
    config.model.name = "lvvit_l"
    config.model.options.drop_path = 0.3
    config.model.options.remat = True
    config.augment.randaugment = "rand-m9-n3-mstd0.5-inc1"
    config.optim.learning_rate = 1e-3
    return config
