"""Segments scenes of handwritten digits: the class of every pixel, a few minutes on two CPU cores.

Without --config.model.init_from the backbone starts from new weights. With it, from a classifier, such as the
student of the recipe `digits_small`, whose docstring has the commands that write the data set and train it:

    python -m tlvit.main --config=configs/digits_segmentation.py --workdir=/tmp/demo/segmentation \\
        --config.data.dir=/tmp/demo/data --config.model.init_from=/tmp/demo/student
    python -m tlvit.predict --checkpoint=/tmp/demo/segmentation --out=/tmp/demo/maps photo.png

Every digit of a scene is of its class, and the background is a class, too. Hardware: two CPU cores.
Published: no result. Measured with tlvit: the table of segmentation in docs/results.md
(python -m scripts.compare_token_labels --studies segmentation).
"""

from tlvit.config import default


def get_config():
    config = default()
    config.task = "segmentation"
    config.image_size = (24, 24)
    config.batch_size = 32
    config.steps = 1000
    config.token_labels = False
    config.log_every = 50
    config.data.name = "digits"
    config.data.eval_split = "test"
    config.model.name = "upernet"
    config.model.dtype = "float32"
    config.model.options = {
        "backbone": "lvvit_s",  # at the size of the recipe digits_small
        "patch_size": 4,
        "dim": 48,
        "depth": 3,
        "num_heads": 4,
        "stem_width": 16,
        "skip_lam": 1.0,
        "channels": 32,
        "last_width": 64,
    }
    config.augment.hflip = 0.0  # mirrored digits are not digits
    config.augment.randaugment = ""
    config.augment.random_erasing = 0.0
    config.segmentation.scale = (48, 24)
    config.segmentation.scale_range = (0.75, 1.5)
    config.segmentation.max_class_ratio = 1.0  # most of a scene is background
    config.segmentation.normalize = "valid"
    config.segmentation.window = 24
    config.segmentation.stride = 16
    config.optim.base_batch_size = 32
    config.optim.learning_rate = 2e-3
    config.optim.weight_decay = 0.01
    config.optim.schedule = "poly"
    config.optim.schedule_unit = "step"
    config.optim.warmup_steps = 100
    config.optim.warmup_lr = 1e-6
    config.optim.min_lr = 0.0
    config.optim.clip_norm = 1.0
    config.ema.decay = 0.99
    config.ema.warmup = True
    config.eval.every_steps = 500
    config.eval.batch_size = 100
    config.checkpoint.every_steps = 500
    return config
