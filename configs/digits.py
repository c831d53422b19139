"""Token labels on scenes of handwritten digits of 48 pixels, minutes for each training on two CPU cores.

The demo, the notebook and the comparisons use configs/digits_small.py, which is faster. By hand (the first
command writes the data set, once):

    python -c "from tlvit.data.sources import digit_scenes; \\
        digit_scenes.prepare('/tmp/demo/data', num_train=2000, num_test=2000)"
    python -m tlvit.main --config=configs/digits.py:annotator --workdir=/tmp/demo/annotator \\
        --config.data.dir=/tmp/demo/data
    python -m tlvit.annotate --checkpoint=/tmp/demo/annotator --data=digits --data-dir=/tmp/demo/data \\
        --top-k=10 --out=/tmp/demo/score_maps
    python -m tlvit.main --config=configs/digits.py --workdir=/tmp/demo/student \\
        --config.data.dir=/tmp/demo/data --config.data.score_maps=/tmp/demo/score_maps
    python -m tlvit.main --config=configs/digits.py:no_token_labels --workdir=/tmp/demo/baseline \\
        --config.data.dir=/tmp/demo/data
    python -m tlvit.main --config=configs/digits.py:relabel --workdir=/tmp/demo/relabel \\
        --config.data.dir=/tmp/demo/data --config.data.score_maps=/tmp/demo/score_maps

Hardware: two CPU cores. Published: no result. Measured with tlvit: three seeds of version 0.1
(docs/results.md).
"""

from tlvit.config import check_variant, default

VARIANTS = ("token_labels", "no_token_labels", "relabel", "annotator")
SCENES = {"num_train": 2000, "num_test": 2000}  # arguments of tlvit.data.sources.digit_scenes.prepare
TOP_K = 10  # all classes: the score maps hold every cell's whole distribution


def get_config(variant: str = "token_labels"):
    check_variant("digits", variant, VARIANTS)
    config = default()
    config.image_size = (48, 48)
    config.batch_size = 64
    config.epochs = 40
    config.cooldown_epochs = 0
    config.token_labels = variant in ("token_labels", "relabel")
    config.data.name = "digits"
    config.data.eval_split = "test"
    config.model.dtype = "float32"
    # A small crop often misses the large digit. The score map then says so; the image label does not.
    config.augment.crop_scale = (0.15, 1.0)
    config.augment.hflip = 0.0  # mirrored digits are not digits
    config.augment.randaugment = ""
    config.augment.random_erasing = 0.0
    config.loss.mixtoken = False
    config.loss.plain_labels = True
    config.optim.base_batch_size = 64
    config.optim.learning_rate = 1e-3
    config.optim.warmup_epochs = 3.0
    config.optim.schedule_unit = "step"
    config.optim.clip_norm = 1.0
    config.ema.decay = 0.99
    config.ema.warmup = True
    config.eval.crop_pct = 1.0
    config.eval.every_epochs = 5
    config.checkpoint.every_epochs = 5
    config.model.name = "lvvit_s"
    config.model.options = {
        "patch_size": 8,
        "dim": 96,
        "depth": 4,
        "num_heads": 4,
        "stem_width": 32,
        "skip_lam": 1.0,
        "rule": "class",  # for all variants: without token labels the token head is not trained
    }
    if variant == "relabel":  # the class token alone learns, from the score map of the whole crop
        config.loss.dense_weight = 0.0
    if variant == "annotator":
        config.batch_size = 32
        config.optim.base_batch_size = 32
        config.optim.learning_rate = 1e-2
        config.augment.crop_scale = (0.5, 1.0)
        config.model.name = "regnety_002"  # its family, at a size for 48-pixel scenes: 12x12 cells
        config.model.options = {
            "widths": (48, 64, 96),
            "depths": (1, 1, 1),
            "strides": (2, 1, 1),
            "group_width": 96,
            "stem_width": 24,
        }
    return config
