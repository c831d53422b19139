"""Semantic segmentation of ADE20K with UperNet over LV-ViT (Jiang et al. 2021, arXiv:2104.10858).

    python -m tlvit.main --config=configs/upernet_lvvit.py:s --workdir=/runs/upernet_lvvit_s \\
        --config.data.name=/data/ADEChallengeData2016 --config.model.init_from=/runs/lvvit_s

The variant after the colon is s, m or l. `init_from` is a classifier of the same size, a workdir, a model
folder or a published file: it fills the backbone. The settings are the published ones with their quirks;
docs/segmentation.md lists each quirk with the setting that turns it off. The published runs compute in
float32 (--config.model.dtype=float32).

Hardware: 8 accelerators of 16 GB (l: 16); fewer with --config.optim.accumulate=N. Published: mIoU 47.9, 49.4
and 50.9 %, multi-scale 48.6, 50.6 and 51.8 %, with 4 images a GPU (l: 2); the number of GPUs is not stated,
so the batch of 16 is an assumption. Measured with tlvit: nothing yet.
"""

from tlvit.config import check_variant, default

DROP_PATH = {"s": 0.1, "m": 0.2, "l": 0.5}  # as published: the rates of the dropout in the MLPs


def get_config(variant: str = "s"):
    check_variant("upernet_lvvit", variant, DROP_PATH)
    config = default()
    config.task = "segmentation"
    config.image_size = (512, 512)
    config.batch_size = 16
    config.steps = 160_000
    config.token_labels = False
    config.model.name = f"upernet_lvvit_{variant}"
    config.model.options.drop_path = DROP_PATH[variant]
    if variant == "l":
        config.image_size = (448, 448)  # of the position embeddings; the crop is larger
        config.segmentation.crop_size = (512, 512)
        config.model.options.remat = True
    config.data.name = "ADEChallengeData2016"
    config.data.train_split = "training"
    config.data.eval_split = "validation"
    config.segmentation.num_classes = 150
    config.segmentation.reduce_zero_label = True
    config.augment.randaugment = ""
    config.augment.random_erasing = 0.0
    config.optim.learning_rate = 6e-5
    config.optim.base_batch_size = 16
    config.optim.weight_decay = 0.01
    config.optim.no_decay = ()  # everything decays
    config.optim.schedule = "poly"
    config.optim.schedule_unit = "step"
    config.optim.warmup_steps = 1500
    config.optim.warmup_lr = 6e-11
    config.optim.min_lr = 0.0
    config.ema.decay = 0.0
    config.eval.every_steps = 8000
    config.eval.batch_size = 8
    config.checkpoint.every_steps = 8000
    return config
