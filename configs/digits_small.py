"""Token labels on small scenes of digits: the demo and the comparison of trainings, on two CPU cores.

`make demo` and `python -m scripts.compare_token_labels` run all of it. By hand (the first command writes the
data set, once):

    python -c "from configs.digits_small import SCENES; from tlvit.data.sources import digit_scenes; \\
        digit_scenes.prepare('/tmp/demo/data', **SCENES)"
    python -m tlvit.main --config=configs/digits_small.py:annotator --workdir=/tmp/demo/annotator \\
        --config.data.dir=/tmp/demo/data
    python -m tlvit.annotate --checkpoint=/tmp/demo/annotator --data=digits --data-dir=/tmp/demo/data \\
        --top-k=10 --out=/tmp/demo/score_maps
    python -m tlvit.main --config=configs/digits_small.py --workdir=/tmp/demo/student \\
        --config.data.dir=/tmp/demo/data --config.data.score_maps=/tmp/demo/score_maps
    python -m tlvit.main --config=configs/digits_small.py:no_token_labels --workdir=/tmp/demo/baseline \\
        --config.data.dir=/tmp/demo/data

Hardware: two CPU cores. Published: no result. Measured with tlvit: the tables of docs/results.md
(python -m scripts.compare_token_labels).
"""

from tlvit.config import check_variant, default

VARIANTS = ("token_labels", "no_token_labels", "annotator")
EPOCHS = 30
# Arguments of tlvit.data.sources.digit_scenes.prepare. The digits are drawn from 8x8 pixels.
SCENES = {
    "num_train": 2000,
    "num_test": 2000,
    "size": 24,
    "digit_scale": (0.65, 0.85),
    "distractors": (1, 1),
    "distractor_scale": (0.25, 0.35),
}
TOP_K = 10  # all classes: the score maps hold every cell's whole distribution


def get_config(variant: str = "token_labels"):
    check_variant("digits_small", variant, VARIANTS)
    config = default()
    config.image_size = (24, 24)
    config.batch_size = 32
    config.epochs = EPOCHS
    config.cooldown_epochs = 0
    config.token_labels = variant == "token_labels"
    config.data.name = "digits"
    config.data.eval_split = "test"
    config.model.dtype = "float32"
    # A small crop often misses the large digit. The score map then says so; the image label does not.
    config.augment.crop_scale = (0.3, 1.0)
    config.augment.hflip = 0.0  # mirrored digits are not digits
    config.augment.randaugment = ""
    config.augment.random_erasing = 0.0
    config.loss.plain_labels = True
    config.loss.cls_target = "label"  # the annotator is weaker than the labels of whole scenes
    config.optim.base_batch_size = 32
    config.optim.learning_rate = 2e-3
    config.optim.warmup_epochs = 1.0
    config.optim.schedule_unit = "step"
    config.optim.clip_norm = 1.0
    config.ema.decay = 0.99
    config.ema.warmup = True
    config.eval.crop_pct = 1.0
    config.eval.every_epochs = 4
    config.checkpoint.every_epochs = 4
    config.model.name = "lvvit_s"
    config.model.options = {
        "patch_size": 4,
        "dim": 48,
        "depth": 3,
        "num_heads": 4,
        "stem_width": 16,
        "skip_lam": 1.0,
        "rule": "class",  # for all variants: without token labels the token head is not trained
    }
    if variant == "annotator":
        config.epochs = 40
        config.optim.learning_rate = 1e-2
        config.augment.crop_scale = (0.5, 1.0)
        config.model.name = "regnety_002"  # its family, at a size for 24-pixel scenes: 6x6 cells
        config.model.options = {
            "widths": (48, 64, 96),
            "depths": (1, 1, 1),
            "strides": (2, 1, 1),
            "group_width": 96,
            "stem_width": 24,
        }
    return config
