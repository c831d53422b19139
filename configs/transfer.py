"""Fine-tunes a trained model on another data set with image labels.

    python -m tlvit.main --config=configs/transfer.py:cifar10 --workdir=/runs/cifar10 \\
        --config.model.init_from=t2t_vit_14.pth.tar
    python -m tlvit.main --config=configs/transfer.py:folder --workdir=/runs/photos \\
        --config.data.name=photos --config.model.name=lvvit_s --config.model.init_from=lvvit_s.pth.tar

cifar10, cifar100: as T2T-ViT published it (transfer_learning.py and README of yitu-opensource/T2T-ViT): SGD
with momentum 0.9, learning rate 0.05 for the head and 5e-4 for stem and blocks, both down to 2e-4; the class
token and the last norm are frozen, and all other parameters are decayed. Published top-1: 98.3 and 88.4 %
(T2T-ViT-14), 98.4 and 89.0 % (T2T-ViT-19).

deit_cifar10, deit_cifar100, deit_flowers, deit_cars: DeiT's settings, which its author gives for CIFAR-10 and
Cars (facebookresearch/deit, issue 45): SGD, learning rate 0.01 at batch 768, decay 1e-4, 1000 epochs, without
random erasing and drop path, all else as on ImageNet. For CIFAR-100 and Flowers-102 they are used here, too.
deit_inat2018, deit_inat2019: AdamW, learning rate 7.5e-5 at batch 768, decay 0.05, 360 epochs, random erasing
0.1, drop path 0.1 (issue 105; 7.5e-5 is the rate after scaling, issue 141). TFDS has no iNaturalist 2019, so
--config.data.name is a folder.

folder, the default: about 500 images of your own in ROOT/train/CLASS and ROOT/val/CLASS: AdamW with
layer-wise decay and moderate augmentation. Not published.

Hardware: one GPU for cifar10, cifar100 and folder, 8 GPUs for DeiT's. Measured with tlvit: nothing on these
data sets; docs/transfer.md has a small run.
"""

from tlvit.config import check_variant, default

DEIT = {  # name -> TFDS name, training split, evaluation split
    "deit_cifar10": ("cifar10", "train", "test"),
    "deit_cifar100": ("cifar100", "train", "test"),
    "deit_flowers": ("oxford_flowers102", "train+validation", "test"),
    "deit_cars": ("cars196", "train", "test"),
    "deit_inat2018": ("i_naturalist2018", "train", "validation"),
    "deit_inat2019": ("inaturalist2019", "train", "val"),
}
VARIANTS = ("cifar10", "cifar100", *DEIT, "folder")


def get_config(variant: str = "folder"):
    check_variant("transfer", variant, VARIANTS)
    config = default()
    config.token_labels = False
    config.cooldown_epochs = 0
    config.model.init_required = True
    if variant in DEIT:
        config.data.name, config.data.train_split, config.data.eval_split = DEIT[variant]
        return deit(config, sgd="inat" not in variant)
    return folder(config) if variant == "folder" else t2t_vit(config, variant)


def t2t_vit(config, dataset: str):
    """The published transfer of T2T-ViT to CIFAR."""
    config.data.name, config.data.eval_split = dataset, "test"
    config.data.mean, config.data.std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    config.model.name = "t2t_vit_14"
    config.model.options.drop_path = 0.1
    config.batch_size = 64
    config.epochs = 60
    config.augment.crop = "padded"
    config.augment.crop_padding = 28
    config.augment.interpolation = "bilinear"
    config.augment.randaugment = ""
    config.augment.random_erasing = 0.0
    config.loss.label_smoothing = 0.0
    config.loss.plain_labels = True
    config.optim.name = "momentum"
    config.optim.learning_rate = 0.05
    config.optim.base_batch_size = 64
    config.optim.min_lr = 2e-4
    config.optim.warmup_epochs = 0.0
    config.optim.weight_decay = 5e-4
    config.optim.no_decay = ()
    config.optim.lr_scale = {"*": 0.0, "tokens_to_token/*": 0.01, "blocks/*": 0.01, "head/*": 1.0}
    config.optim.scale_min_lr = False
    config.ema.decay = 0.0
    config.eval.crop_pct = 1.0
    config.eval.interpolation = "bilinear"
    return config


def deit(config, *, sgd: bool):
    """DeiT's fine-tuning: with SGD, or with AdamW for iNaturalist."""
    config.model.name = "deit_base_patch16_224"
    config.model.options.drop_path = 0.0 if sgd else 0.1
    config.batch_size = 768
    config.epochs = 1000 if sgd else 360
    config.augment.repeats = 3
    config.augment.interpolation = "bicubic"
    config.augment.randaugment_interpolation = "bicubic"
    config.augment.random_erasing = 0.0 if sgd else 0.1
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.optim.name = "sgd" if sgd else "adamw"
    config.optim.learning_rate = 0.01 if sgd else 7.5e-5
    config.optim.base_batch_size = 768
    config.optim.weight_decay = 1e-4 if sgd else 0.05
    config.optim.no_decay = ("vectors", "pos_embed", "cls_token")
    config.ema.decay = 0.99996
    return config


def folder(config):
    """About 500 images: 15 steps in an epoch, 900 in all."""
    config.data.eval_split = "val"
    config.model.options.drop_path = 0.1
    config.batch_size = 32
    config.epochs = 60
    config.augment.crop_scale = (0.35, 1.0)
    config.augment.randaugment = "rand-m6-n2-mstd0.5-inc1"
    config.augment.random_erasing = 0.0
    config.loss.plain_labels = True
    config.optim.learning_rate = 5e-4
    config.optim.base_batch_size = 32
    config.optim.min_lr = 1e-6
    config.optim.schedule_unit = "step"
    config.optim.layer_decay = 0.75
    config.optim.clip_norm = 1.0
    config.ema.decay = 0.99
    config.ema.warmup = True
    config.eval.every_epochs = 5
    config.checkpoint.every_epochs = 5
    return config
