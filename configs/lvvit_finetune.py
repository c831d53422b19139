"""Fine-tunes an LV-ViT at a larger size with token labels (Jiang et al. 2021, arXiv:2104.10858).

    python -m tlvit.main --config=configs/lvvit_finetune.py:lvvit_s --workdir=/runs/lvvit_s_384 \\
        --config.model.init_from=/runs/lvvit_s --config.data.score_maps=/data/score_maps/imagenet2012-train

After the colon comes lvvit_s, lvvit_m or lvvit_l; the size is 384 (L: 512), --config.image_size=448,448
another. Position embeddings are resized, and the token labels are sampled on the larger grid from the same
maps. Published top-1: 84.4 % (S at 384), 85.4 and 85.5 % (M at 384 and 448), 86.4 % (L at 512, from 448) at
batch 512; the published command names no number of epochs, here it is 30. Not yet trained here.
"""

from configs import common

DROP_PATH = {"lvvit_s": 0.1, "lvvit_m": 0.2, "lvvit_l": 0.3}  # as in training


def get_config(model: str = "lvvit_s"):
    if model not in DROP_PATH:
        known = ", ".join(DROP_PATH)
        raise ValueError(
            f"configs/lvvit_finetune.py:{model} is unknown; after the colon comes one of {known}."
        )
    config = common.get_config()
    config.image_size = (512, 512) if model == "lvvit_l" else (384, 384)
    config.batch_size = 512
    config.epochs = 30
    config.floor_epochs = 0
    config.model.name = model
    config.model.options.drop_path = DROP_PATH[model]
    config.optim.learning_rate = 5e-6
    config.optim.floor = 5e-6
    config.optim.reference_batch = 512
    config.optim.weight_decay = 1e-8
    config.eval.crop_pct = 0.9 if model == "lvvit_s" else 1.0
    if model == "lvvit_l":
        config.model.options.remat = True
        config.augment.randaugment = "rand-m9-n3-mstd0.5-inc1"
    return config
