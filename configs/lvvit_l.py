"""LV-ViT-L on ImageNet at 448 or 224 pixels with token labels (Jiang et al. 2021, arXiv:2104.10858).

    python -m tlvit.main --config=configs/lvvit_l.py --workdir=/runs/lvvit_l \\
        --config.data.score_maps=/data/score_maps
    python -m tlvit.main --config=configs/lvvit_l.py:224 --workdir=/runs/lvvit_l_224 \\
        --config.data.score_maps=/data/score_maps

The variant after the colon is the image size, 448 (the default) or 224. The published weights are for 448 and
512 pixels; the published command trains at 224, and no result is given for that size.

Hardware: at 448, 16 or more accelerators of 16 GB at batch 1024; fewer with --config.optim.accumulate=N,
which runs a batch in N parts. 32 images at a time fit on one of 16 GB (docs/costs.md). The blocks are
recomputed in the backward pass (remat) to save memory.
Published: 86.2 % top-1 at 448 (150.5 M parameters, 157 G multiply-adds; tlvit counts 155.1 G). Measured
with tlvit: nothing yet.
"""

from tlvit.config import check_variant, default

VARIANTS = ("448", "224")


def get_config(variant: str = "448"):
    check_variant("lvvit_l", variant, VARIANTS)
    config = default()
    config.image_size = (int(variant), int(variant))
    config.model.name = "lvvit_l"
    config.model.options.drop_path = 0.3
    config.model.options.remat = True
    config.augment.randaugment = "rand-m9-n3-mstd0.5-inc1"
    config.optim.learning_rate = 1e-3
    return config
