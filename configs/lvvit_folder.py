"""LV-ViT-S on your own class folders, ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg.

With token labels: an annotator learns your classes, scores the training images, and LV-ViT learns from that.

    python -m tlvit.main --config=configs/lvvit_folder.py:annotator --workdir=/runs/annotator \\
        --config.data.name=ROOT
    python -m tlvit.annotate --model=/runs/annotator --data=ROOT --split=train --out=ROOT/score_maps
    python -m tlvit.main --config=configs/lvvit_folder.py --workdir=/runs/mine --config.data.name=ROOT \\
        --config.data.score_maps=ROOT/score_maps

Without (mixup and cutmix take their place, as they do for the annotator):

    python -m tlvit.main --config=configs/lvvit_folder.py:no_token_labels --workdir=/runs/mine \\
        --config.data.name=ROOT

Without a folder val: --config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]'. Maps of
the whole of train serve its parts, too.

Start from published weights with --config.model.init_from=FILE.pth: heads for other classes start anew. That
matters most for the annotator, a RegNetY-1.6GF: the better it is, the better are the labels. One GPU is
enough for tens of thousands of images. No accuracy is claimed: it is your data.
"""

from configs import common

ARMS = ("token_labels", "no_token_labels", "annotator")


def get_config(arm: str = "token_labels"):
    if arm not in ARMS:
        raise ValueError(
            f"configs/lvvit_folder.py:{arm} is unknown; after the colon comes one of {', '.join(ARMS)}."
        )
    config = common.get_config()
    config.token_labels = arm == "token_labels"
    config.batch_size = 128
    config.epochs = 100
    config.floor_epochs = 0
    config.data.eval_split = "val"
    config.model.name = "regnety_016" if arm == "annotator" else "lvvit_s"
    config.model.options.drop_path = 0.1
    config.optim.schedule_per = "step"
    config.ema.decay = 0.999
    config.ema.warmup = True
    if arm != "token_labels":
        config.augment.mixup = 0.8
        config.augment.cutmix = 1.0
    if arm == "no_token_labels":
        config.model.options.rule = "class"  # the token head learns nothing here
    return config
