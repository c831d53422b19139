"""LV-ViT-S on your own class folders: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg.

With token labels: an annotator is trained on your classes and scores the training images; LV-ViT learns from
these score maps.

    python -m tlvit.main --config=configs/lvvit_folder.py:annotator --workdir=/runs/annotator \\
        --config.data.name=ROOT
    python -m tlvit.annotate --checkpoint=/runs/annotator --data=ROOT --split=train --out=ROOT/score_maps
    python -m tlvit.main --config=configs/lvvit_folder.py --workdir=/runs/student --config.data.name=ROOT \\
        --config.data.score_maps=ROOT/score_maps

Without token labels, with mixup and cutmix in their place:

    python -m tlvit.main --config=configs/lvvit_folder.py:no_token_labels --workdir=/runs/baseline \\
        --config.data.name=ROOT

Without a folder val, split the training folder: --config.data.train_split='train[:90%]'
--config.data.eval_split='train[90%:]'. Score maps of the whole train folder serve both parts.

Start from published weights with --config.model.init_from=FILE.pth; heads for another number of classes are
reinitialized. This matters most for the annotator (a RegNetY-1.6GF), because its accuracy limits the quality
of the token labels. --config.optim.lr_scale="{'*':0,'head/*':1}" then trains its head alone, and
"{'*':0.1,'head/*':1}" the other layers with a tenth of the learning rate.

The settings are for 200 to 20,000 images; with more, take a larger batch, which also scales the learning
rate. Hardware: one GPU; on a CPU add --config.model.dtype=float32. Published: no result. Measured with tlvit:
nothing on photographs; docs/results.md has results on digits.
"""

from tlvit.config import check_variant, default

VARIANTS = ("token_labels", "no_token_labels", "annotator")


def get_config(variant: str = "token_labels"):
    check_variant("lvvit_folder", variant, VARIANTS)
    config = default()
    config.token_labels = variant == "token_labels"
    # For 200 to 20,000 images: 6 to 625 steps in an epoch.
    config.batch_size = 32
    config.epochs = 100
    config.cooldown_epochs = 0
    config.data.eval_split = "val"
    config.model.name = "regnety_016" if variant == "annotator" else "lvvit_s"
    config.model.options.drop_path = 0.1
    config.optim.learning_rate = 5e-4
    config.optim.base_batch_size = 64
    config.optim.min_lr = 1e-6
    config.optim.schedule_unit = "step"  # the warm-up rises in the 30 to 3,000 steps of its 5 epochs
    config.optim.clip_norm = 1.0
    config.ema.decay = 0.999
    config.ema.warmup = True  # averages about a tenth of the steps until the decay is reached
    config.eval.every_epochs = 5
    config.checkpoint.every_epochs = 5
    if variant != "token_labels":
        config.augment.mixup = 0.8
        config.augment.cutmix = 1.0
    if variant == "no_token_labels":
        config.model.options.rule = "class"  # the token head is not trained
    return config
