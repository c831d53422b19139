"""The demo: token labels on scenes of real handwritten digits, a few minutes a training on two CPU cores.

`make demo` does all of it; by hand (the first line makes the data, once):

    python -c "from tlvit.data.sources import digit_scenes; \\\\
        digit_scenes.prepare('/tmp/demo/data', num_train=2000, num_test=2000)"
    python -m tlvit.main --config=configs/digits.py:annotator --workdir=/tmp/demo/annotator \\
        --config.data.dir=/tmp/demo/data
    python -m tlvit.annotate --model=/tmp/demo/annotator --data=digits --data-dir=/tmp/demo/data \\
        --top-k=10 --out=/tmp/demo/score_maps
    python -m tlvit.main --config=configs/digits.py --workdir=/tmp/demo/student \\
        --config.data.dir=/tmp/demo/data --config.data.score_maps=/tmp/demo/score_maps
    python -m tlvit.main --config=configs/digits.py:no_token_labels --workdir=/tmp/demo/baseline \\
        --config.data.dir=/tmp/demo/data

Measured accuracy (python -m scripts.compare_token_labels): see the README's table.
"""

from configs import common

ARMS = ("token_labels", "no_token_labels", "annotator")
SCENES = {"num_train": 2000, "num_test": 2000}  # of tlvit.data.sources.digit_scenes.prepare
TOP_K = 10  # all classes: a cell's full distribution


def get_config(arm: str = "token_labels"):
    if arm not in ARMS:
        raise ValueError(
            f"configs/digits.py:{arm} is unknown; after the colon comes one of {', '.join(ARMS)}."
        )
    config = common.get_config()
    config.image_size = (48, 48)
    config.batch_size = 64
    config.epochs = 40
    config.floor_epochs = 0
    config.token_labels = arm == "token_labels"
    config.data.name = "digits"
    config.data.eval_split = "test"
    config.model.dtype = "float32"
    # A strong crop often loses the digit: the map follows, the label does not.
    config.augment.crop_scale = (0.15, 1.0)
    config.augment.flip = 0.0  # a mirrored 3 is no 3
    config.augment.randaugment = ""
    config.augment.erasing = 0.0
    config.loss.mixtoken = False
    config.loss.plain_labels = True
    config.optim.reference_batch = 64
    config.optim.learning_rate = 1e-3
    config.optim.warmup_epochs = 3.0
    config.optim.schedule_per = "step"
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
        "rule": "class",  # of inference, for all arms: without token labels the token head learns nothing
    }
    if arm == "annotator":
        config.batch_size = 32
        config.optim.reference_batch = 32
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
