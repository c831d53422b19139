"""Every setting of a run: its name, default, range and meaning.

A recipe edits `default()`, an `ml_collections.ConfigDict`, and command-line flags override it
(--config.optim.learning_rate=8e-4). A command calls `resolve` once, at its start, and gets a `Config` of
frozen dataclasses. Everything below the commands takes a `Config` or one of its sections.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from tlvit.section import Section, annotations, range_text, setting

MAX_BATCH = 131_072  # images in a batch
MAX_EPOCHS = 100_000
MAX_STEPS = 2**31 - 1  # of a run: an int32 counts them
MAX_IMAGE_SIZE = 4096  # pixels
MAX_THREADS = 1024  # that read images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Section):
    """The model that is trained."""

    prefix: ClassVar[str] = "config.model."

    name: str = setting("lvvit_s", "Name of the model, one of tlvit.list_models().")
    dtype: str = setting(
        "bfloat16",
        "Type of the computation. Parameters, norm statistics and losses are float32.",
        choices=("float32", "bfloat16"),
    )
    options: Mapping[str, Any] = setting(
        {}, "Options of the model class, for example drop_path or depth; tlvit summary NAME lists them."
    )
    init_from: str = setting(
        "",
        "Checkpoint whose weights the run starts from: a workdir, a model folder or a PyTorch file. Position "
        "embeddings are resized; heads for another number of classes are reinitialized. Options of the model "
        "that are not set are the checkpoint's, except dropout, drop path, remat and scan_blocks.",
    )
    init_missing: tuple[str, ...] = setting(
        (),
        "Parameters that the checkpoint of init_from may lack, by the beginnings of their names. aux_head "
        "and head_dist then start as copies of the class head, and dist_token of the class token.",
    )
    init_unexpected: tuple[str, ...] = setting(
        (),
        "Parameters of the checkpoint of init_from that are left out, by the beginnings of their names.",
    )
    init_required: bool = setting(False, "Refuse to start without init_from. Recipes that fine-tune set it.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Section):
    """The images and score maps."""

    prefix: ClassVar[str] = "config.data."

    name: str = setting(
        "imagenet2012",
        'A TFDS data set, "digits" (scenes of handwritten digits), or a folder ROOT with images in '
        "ROOT/SPLIT/CLASS/.",
    )
    dir: str = setting("", "Folder of the TFDS data sets. Empty: ~/tensorflow_datasets.")
    train_split: str = setting("train", 'Training split, for example "train" or "train[:90%]".')
    eval_split: str = setting("validation", "Evaluation split.")
    score_maps: str = setting("", "Folder of the training split's score maps, written by tlvit annotate.")
    annotator: str = setting(
        "",
        "Checkpoint of an annotator (a workdir, a model folder or a PyTorch file) that scores the augmented "
        "images inside the training step, in place of data.score_maps.",
    )
    annotator_image_size: tuple[int, ...] = setting(
        (),
        "Image size of data.annotator, (height, width). Empty: the checkpoint's.",
        low=1,
        high=MAX_IMAGE_SIZE,
    )
    label_crop: Literal["aligned", "published"] = setting(
        "aligned",
        '"aligned" samples the score map where the pixels of the crop come from. "published" exchanges the '
        "two axes of the crop and treats every map as covering the entire image, as the code of 2021 does.",
        choices=("aligned", "published"),
    )
    max_missing_maps: float = setting(
        0.0,
        "Largest fraction of images without a score map. These get maps that have their label in every cell.",
        low=0,
        high=1,
    )
    max_corrupt: float = setting(
        0.001,
        "Largest fraction of corrupt training images. Each is replaced by the next image.",
        low=0,
        high=1,
    )
    shuffle_gib: float = setting(
        2.0, "Host memory of the shuffle buffer, GiB of encoded images.", low=0, high=1024
    )
    threads: int = setting(0, "Threads that decode images. 0: one for each core.", low=0, high=MAX_THREADS)
    exif: Literal["auto", "apply", "ignore"] = setting(
        "auto",
        'Whether images are turned as their EXIF orientation says. "auto": in class folders, not in TFDS '
        "data sets. The published code ignores it.",
        choices=("auto", "apply", "ignore"),
    )
    mean: tuple[float, ...] = setting(
        (),
        "Mean of the red, green and blue pixel values in [0, 1], which is subtracted. Empty: ImageNet's.",
        low=0,
        high=1,
    )
    std: tuple[float, ...] = setting(
        (),
        "Standard deviation of the red, green and blue pixel values in [0, 1], by which they are divided. "
        "Empty: ImageNet's.",
        above=0,
        high=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, 3):
                raise ValueError(f"{self.prefix}{name} must be three numbers, not {values}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment(Section):
    """Augmentation of the training images."""

    prefix: ClassVar[str] = "config.augment."

    crop: Literal["resized", "padded"] = setting(
        "resized",
        '"resized" resizes a random box, of which crop_scale and crop_ratio are the ranges. "padded" resizes '
        "the image so that it covers image_size, pads it by crop_padding and takes a random crop of "
        "image_size.",
        choices=("resized", "padded"),
    )
    crop_padding: int = setting(
        4, 'Padding on each side with crop="padded", pixels.', low=0, high=MAX_IMAGE_SIZE
    )
    padding_mode: Literal["constant", "reflect"] = setting(
        "constant",
        'Pixels of the padding: black ("constant") or the mirrored image ("reflect").',
        choices=("constant", "reflect"),
    )
    crop_scale: tuple[float, float] = setting(
        (0.08, 1.0), "Range of the random resized crop's area, as a fraction of the image.", above=0, high=1
    )
    crop_ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3), "Range of the random resized crop's width / height.", above=0, high=100
    )
    hflip: float = setting(0.5, "Probability of a horizontal flip.", low=0, high=1)
    interpolation: Literal["bilinear", "bicubic", "random"] = setting(
        "random",
        'Interpolation of the resize. "random" draws one of the two for every image.',
        choices=("bilinear", "bicubic", "random"),
    )
    antialias: bool = setting(
        False,
        "Resize from the fully decoded image with antialiasing, as Pillow does. About half the images/s.",
    )
    randaugment: str = setting(
        "rand-m9-n2-mstd0.5-inc1",
        "RandAugment policy in timm's notation: m is the magnitude, n the number of operations for an image, "
        "mstd the standard deviation of the magnitude; with inc1 all operations get stronger with the "
        "magnitude. Empty: none.",
    )
    randaugment_on: str = setting(
        "host",
        'Where RandAugment runs: on the "host", or inside the training step on the "device" for hosts with '
        "few cores.",
        choices=("host", "device"),
    )
    randaugment_interpolation: Literal["bilinear", "bicubic", "random"] = setting(
        "bilinear",
        'Interpolation of RandAugment\'s rotations and shears on the host. "random" draws one of the two for '
        "each operation.",
        choices=("bilinear", "bicubic", "random"),
    )
    order: Literal["crop_first", "published"] = setting(
        "crop_first",
        '"crop_first": RandAugment changes the crop at its final size. "published": flip, RandAugment on the '
        "whole image, crop last, as the code of 2021 does with token labels; slower.",
        choices=("crop_first", "published"),
    )
    three_augment: bool = setting(False, "DeiT III's 3-Augment: grayscale, solarize or blur.")
    color_jitter: float = setting(
        0.0, "Strength of brightness, contrast and saturation jitter.", low=0, high=10
    )
    repeats: int = setting(
        1,
        "Repeated augmentation: views of an image in one step, on different devices. An epoch then has "
        "1 / repeats of the images.",
        low=1,
        high=100,
    )
    random_erasing: float = setting(
        0.25, "Probability of random erasing with pixel noise, in the training step.", low=0, high=1
    )
    erase_mixed: bool = setting(
        False, "Random erasing after mixup and cutmix instead of before them, as T2T-ViT does."
    )
    mixup: float = setting(
        0.0, "Alpha of mixup; not while patch tokens learn from score maps. 0: none.", low=0, high=1000
    )
    cutmix: float = setting(
        0.0, "Alpha of cutmix; not while patch tokens learn from score maps. 0: none.", low=0, high=1000
    )

    def __post_init__(self) -> None:
        pairs = {name: getattr(self, name) for name in ("crop_scale", "crop_ratio")}
        wrong = [name for name, pair in pairs.items() if not isinstance(pair, tuple) or len(pair) != 2]
        if not wrong:
            super().__post_init__()  # these are numbers
            wrong = [name for name, (low, high) in pairs.items() if low > high]
        if wrong:
            name = wrong[0]
            raise ValueError(f"{self.prefix}{name} must be (low, high) with low <= high, not {pairs[name]}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(Section):
    """Targets and loss."""

    prefix: ClassVar[str] = "config.loss."

    kind: Literal["cross_entropy", "bce"] = setting(
        "cross_entropy",
        'Loss of the class token without token labels: "cross_entropy", or "bce", the mean over all classes '
        "of the binary cross entropy.",
        choices=("cross_entropy", "bce"),
    )
    bce_threshold: float = setting(
        0.0,
        'With kind="bce": classes whose target is above this have the target 1, all others 0. 0 is DeiT '
        "III's: all classes of a mixed image. 1: the targets stay as they are.",
        low=0,
        high=1,
    )
    label_smoothing: float = setting(0.1, "Smoothing of labels and token labels.", low=0, high=1)
    dense_weight: float = setting(
        1.0,
        "Weight of the patch tokens' loss. 0: only the class token learns, in a model with or without a "
        "token head; mixup and cutmix are then allowed in place of MixToken, and with cls_target=label no "
        "score maps are needed.",
        low=0,
        high=1e6,
    )
    cls_weight: float = setting(1.0, "Weight of the class token's loss.", low=0, high=1e6)
    cls_target: str = setting(
        "annotator",
        'Target of the class token with token labels: the score map ("annotator"), a mixture of map and '
        'label ("published": as --ground-truth runs in the published code, "documented": as its '
        'documentation says), or the "label".',
        choices=("annotator", "published", "documented", "label"),
    )
    mixtoken: bool = setting(True, "MixToken among the images of each device, with token labels.")
    plain_labels: bool = setting(False, "Allow training on labels alone, without mixup and cutmix.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(Section):
    """Distillation into a model with a distillation token (DeiT), without token labels."""

    prefix: ClassVar[str] = "config.distill."

    teacher: str = setting("", "Checkpoint of the teacher: a workdir, a model folder or a PyTorch file.")
    kind: str = setting(
        "hard",
        '"hard" learns the teacher\'s argmax, "soft" its probabilities at temperature tau.',
        choices=("hard", "soft"),
    )
    alpha: float = setting(0.5, "Weight of the teacher in the loss.", low=0, high=1)
    tau: float = setting(1.0, "Temperature of soft distillation.", above=0, high=1000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Section):
    """Semantic segmentation, for task=segmentation: annotations, augmentation, loss and evaluation."""

    prefix: ClassVar[str] = "config.segmentation."

    num_classes: int = setting(
        0,
        "Number of classes of the annotations. 0: those of ROOT/classes.txt, or of a TFDS data set that "
        "tlvit knows.",
        low=0,
        high=255,
    )
    ignore: int = setting(255, "Index in the annotations of pixels that do not count.", low=0, high=65535)
    reduce_zero_label: bool = setting(False, "Index 0 does not count, and index 1 is class 0, as in ADE20K.")
    scale: tuple[int, int] = setting(
        (2048, 512),
        "Limits of the longer and the shorter side, pixels. Images are resized to the largest size within "
        "them, with their proportions.",
        low=1,
        high=65535,
    )
    scale_range: tuple[float, float] = setting(
        (0.5, 2.0), "Range of the random factor of scale, in training.", above=0, high=100
    )
    crop_size: tuple[int, ...] = setting(
        (), "Size of the random crop, (height, width). Empty: image_size.", low=1, high=MAX_IMAGE_SIZE
    )
    max_class_ratio: float = setting(
        0.75,
        "A crop is drawn again, up to 10 times, while one class has at least this fraction of its labeled "
        "pixels. 1: any crop.",
        above=0,
        high=1,
    )
    photometric: bool = setting(True, "Random brightness, contrast, saturation and hue.")
    aux_weight: float = setting(0.4, "Weight of the auxiliary head's loss.", low=0, high=1e6)
    normalize: str = setting(
        "all",
        'Divides the sum of the loss over the labeled pixels by the number of "all" pixels, as published, or '
        'of the "valid", labeled ones.',
        choices=("all", "valid"),
    )
    window: int = setting(
        512,
        "Side of the sliding window of evaluation and prediction, pixels. 0: whole images.",
        low=0,
        high=MAX_IMAGE_SIZE,
    )
    stride: int = setting(
        341, "Distance between the starts of neighboring sliding windows, pixels.", low=1, high=MAX_IMAGE_SIZE
    )
    ratios: tuple[float, ...] = setting(
        (1.0,),
        "Factors of scale whose predictions are averaged in an evaluation. Published multi-scale: "
        "(0.5, 0.75, 1.0, 1.25, 1.5, 1.75).",
        above=0,
        high=100,
    )
    flip: bool = setting(False, "Also average the predictions for the mirrored images in an evaluation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = {name: getattr(self, name) for name in ("scale", "scale_range")}
        for name, pair in pairs.items():
            if len(pair) != 2:
                raise ValueError(f"{self.prefix}{name} must be two numbers, not {pair}.")
        if len(self.crop_size) not in (0, 2):
            raise ValueError(f"{self.prefix}crop_size must be (height, width), not {self.crop_size}.")
        if self.scale_range[0] > self.scale_range[1]:
            raise ValueError(f"{self.prefix}scale_range must be (low, high), not {self.scale_range}.")
        if self.window and self.stride > self.window:
            raise ValueError(
                f"{self.prefix}stride is {self.stride}, above the window's side of {self.window}: pixels "
                "between two windows would have no prediction."
            )
        if not self.ratios:
            raise ValueError(f"{self.prefix}ratios must have a number.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim(Section):
    """Optimizer and learning-rate schedule."""

    prefix: ClassVar[str] = "config.optim."

    name: str = setting(
        "adamw",
        'Optimizer of the parameters. As in timm, "sgd" is SGD with Nesterov momentum and "momentum" SGD '
        "with ordinary momentum, both 0.9.",
        choices=("adamw", "lamb", "sgd", "momentum"),
    )
    learning_rate: float = setting(
        1.6e-3,
        "Peak learning rate at a batch of base_batch_size; scaled linearly to config.batch_size.",
        low=0,
        high=1000,
    )
    base_batch_size: int = setting(1024, "Batch size that learning_rate is given for.", low=1, high=MAX_BATCH)
    weight_decay: float = setting(
        0.05,
        "Weight decay, of all parameters except those of no_decay. SGD adds it to the gradient; the others "
        "decay the parameters themselves.",
        low=0,
        high=1000,
    )
    no_decay: tuple[str, ...] = setting(
        ("vectors", "pos_embed", "cls_token", "dist_token"),
        'Parameters without weight decay: "vectors" (biases and scales of norms) and last parts of names. '
        "Empty: all parameters are decayed.",
    )
    clip_norm: float = setting(0.0, "Largest global norm of the gradient. 0: no clipping.", low=0, high=1e6)
    lr_scale: Mapping[str, float] = setting(
        {},
        "Factors of the learning rate, by patterns of parameter names: {'*': 0, 'head/*': 1} trains the head "
        "alone. 0 freezes. Of several patterns that match, the longest is used; names are those of "
        "tlvit.functionalize, with slashes.",
    )
    schedule: str = setting(
        "cosine",
        'Learning rate after the warm-up: a "cosine" from the peak to min_lr, or "poly", a polynomial of '
        "degree power. With poly the warm-up multiplies the polynomial by a line from warmup_lr / peak to 1, "
        "as in mmsegmentation.",
        choices=("cosine", "poly"),
    )
    power: float = setting(1.0, "Degree of the polynomial of schedule=poly.", above=0, high=10)
    layer_decay: float = setting(
        1.0,
        "Layer-wise decay of the learning rate: from the last block to the first one, each block has this "
        "times the rate of the block after it; the stem comes before the first block. Multiplies lr_scale.",
        above=0,
        high=1,
    )
    scale_min_lr: bool = setting(
        True,
        "Whether lr_scale and layer_decay also multiply min_lr. The published transfer of T2T-ViT has one "
        "min_lr for all parameters.",
    )
    warmup_epochs: float = setting(5.0, "Length of the linear warm-up, epochs.", low=0, high=MAX_EPOCHS)
    warmup_steps: int = setting(
        0,
        "Length of the warm-up in steps, in place of warmup_epochs. Needs schedule_unit=step. 0: "
        "warmup_epochs.",
        low=0,
        high=MAX_STEPS,
    )
    warmup_lr: float = setting(1e-6, "First learning rate of the warm-up. Not scaled.", low=0, high=1000)
    min_lr: float = setting(1e-5, "Learning rate at the end of the schedule. Not scaled.", low=0, high=1000)
    schedule_unit: str = setting(
        "epoch",
        "Whether the learning rate is updated once an epoch or at every step.",
        choices=("epoch", "step"),
    )
    lag_epochs: int = setting(
        0,
        "Epochs by which the schedule is delayed. DeiT's published loop delays it by one epoch.",
        low=0,
        high=MAX_EPOCHS,
    )
    accumulate: int = setting(
        1,
        "Parts in which a batch is run, their gradients averaged. With segmentation.normalize=valid each "
        "part is divided by its own number of labeled pixels.",
        low=1,
        high=MAX_BATCH,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern, factor in self.lr_scale.items():
            if not 0 <= factor <= 1000:
                raise ValueError(
                    f"{self.prefix}lr_scale has the factor {factor:g} for {pattern!r}: it must be from 0 to "
                    "1000."
                )
        if self.warmup_steps and self.schedule_unit == "epoch":
            raise ValueError(
                f"{self.prefix}warmup_steps is {self.warmup_steps}, but the learning rate is updated once an "
                f"epoch. Set {self.prefix}schedule_unit=step."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema(Section):
    """Exponential moving average of parameters and BatchNorm statistics."""

    prefix: ClassVar[str] = "config.ema."

    decay: float = setting(
        0.99992, "Fraction of the average that a step keeps. 0: no average.", low=0, below=1
    )
    warmup: bool = setting(False, "Use min(decay, (1 + step) / (10 + step)), for short runs.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Section):
    """Evaluation."""

    prefix: ClassVar[str] = "config.eval."

    every_epochs: int = setting(
        1,
        "Epochs between evaluations. The last step is always evaluated. 0: only the last step.",
        low=0,
        high=MAX_EPOCHS,
    )
    every_steps: int = setting(
        0, "Steps between evaluations, in place of every_epochs. 0: every_epochs.", low=0, high=MAX_STEPS
    )
    batch_size: int = setting(
        0, "Images in an evaluation batch. 0: config.batch_size.", low=0, high=MAX_BATCH
    )
    image_size: tuple[int, ...] = setting(
        (),
        "Image size in --mode=eval, (height, width). Empty: the checkpoint's.",
        low=1,
        high=MAX_IMAGE_SIZE,
    )
    crop_pct: float = setting(
        0.0,
        "The image is resized to image_size / crop_pct, then center-cropped. 0: the model's published value. "
        "tlvit eval takes the checkpoint's own, unless a flag sets it.",
        low=0,
        high=1,
    )
    interpolation: Literal["auto", "bilinear", "bicubic"] = setting(
        "auto",
        'Interpolation of the resize. "auto": bicubic. tlvit eval takes the checkpoint\'s own, unless a flag '
        "sets it.",
        choices=("auto", "bilinear", "bicubic"),
    )
    max_corrupt: float = setting(
        0.0, "Largest fraction of corrupt evaluation images. They are left out.", low=0, high=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Section):
    """Checkpoints."""

    prefix: ClassVar[str] = "config.checkpoint."

    every_epochs: int = setting(
        1,
        "Epochs between checkpoints. The last step is always saved. 0: only the last step.",
        low=0,
        high=MAX_EPOCHS,
    )
    every_steps: int = setting(
        0, "Steps between checkpoints, in place of every_epochs. 0: every_epochs.", low=0, high=MAX_STEPS
    )
    keep: int = setting(
        3, "Latest checkpoints that are kept, in addition to the best.", low=1, high=MAX_EPOCHS
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh(Section):
    """The device mesh."""

    prefix: ClassVar[str] = "config.mesh."

    data: int = setting(
        -1,
        "Devices that share a batch and have copies of the parameters. -1: the rest of the devices.",
        low=-1,
        high=1_000_000,
    )
    fsdp: int = setting(
        1,
        "Devices that share a batch and divide parameters, optimizer state and average. -1: the rest.",
        low=-1,
        high=1_000_000,
    )
    model: int = setting(
        1,
        "Devices that divide attention heads and hidden channels (tensor parallelism) and have the same "
        "images. -1: the rest.",
        low=-1,
        high=1_000_000,
    )
    heartbeat_timeout: int = setting(
        100,
        "With several processes: seconds after which the others end when one of them is lost or has failed.",
        low=10,
        high=86_400,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.data, self.fsdp, self.model)
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError(
                f"config.mesh: data {self.data} x fsdp {self.fsdp} x model {self.model}: sizes are at least "
                "1, and one of them may be -1, the rest of the devices."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Section):
    """All settings of a run: the settings below and one section for each of the other classes of this file.

    Raises:
      ValueError: settings exclude each other, or a value is out of its range.

    Example:
      >>> config = tlvit.Config(batch_size=512, optim=tlvit.config.Optim(learning_rate=8e-4))
      >>> config.optim.min_lr
      1e-05
    """

    seed: int = setting(
        0, "Seeds initialization, data order, augmentation, drop path and mixing.", low=0, high=2**32 - 1
    )
    batch_size: int = setting(1024, "Images in a step, over all devices.", low=1, high=MAX_BATCH)
    epochs: int = setting(300, "Epochs of the schedule, warm-up included.", low=1, high=MAX_EPOCHS)
    cooldown_epochs: int = setting(10, "Further epochs at optim.min_lr.", low=0, high=MAX_EPOCHS)
    steps: int = setting(
        0,
        "Length of the run and of the schedule in steps, in place of epochs and cooldown_epochs. 0: epochs.",
        low=0,
        high=MAX_STEPS,
    )
    image_size: tuple[int, int] = setting(
        (224, 224),
        "(height, width). One number on the command line means a square.",
        low=1,
        high=MAX_IMAGE_SIZE,
    )
    token_labels: bool = setting(
        True,
        "Train all tokens on score maps. False: train the class token on labels. With loss.dense_weight=0 "
        "the class token alone learns loss.cls_target, such as the score map pooled over the crop (ReLabel).",
    )
    task: str = setting(
        "classification",
        'What the model learns: the class of an image ("classification") or of every pixel ("segmentation").',
        choices=("classification", "segmentation"),
    )
    log_every: int = setting(50, "Steps between progress lines.", low=1, high=1_000_000)
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    augment: Augment = dataclasses.field(default_factory=Augment)
    loss: Loss = dataclasses.field(default_factory=Loss)
    distill: Distill = dataclasses.field(default_factory=Distill)
    segmentation: Segmentation = dataclasses.field(default_factory=Segmentation)
    optim: Optim = dataclasses.field(default_factory=Optim)
    ema: Ema = dataclasses.field(default_factory=Ema)
    eval: Eval = dataclasses.field(default_factory=Eval)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)

    def __post_init__(self) -> None:
        super().__post_init__()
        mixing = self.augment.mixup or self.augment.cutmix
        if self.learns_patches and mixing:
            raise ValueError(
                f"config.token_labels excludes mixup ({self.augment.mixup:g}) and cutmix "
                f"({self.augment.cutmix:g}): a score map belongs to one image. MixToken "
                "(config.loss.mixtoken) takes their place; set both to 0."
            )
        if self.token_labels and mixing and self.loss.mixtoken:
            raise ValueError(
                f"config.loss.mixtoken and mixup ({self.augment.mixup:g}) or cutmix "
                f"({self.augment.cutmix:g}) would both mix the images. Set config.loss.mixtoken=False, or "
                "mixup and cutmix to 0."
            )
        if self.task == "segmentation":
            self._check_segmentation()
        elif not (self.token_labels or mixing or self.loss.plain_labels):
            raise ValueError(
                "config.token_labels, mixup and cutmix are all off: a vision transformer overfits on labels "
                "alone. Set config.augment.mixup=0.8 and config.augment.cutmix=1.0, or "
                "config.loss.plain_labels=True."
            )
        if self.token_labels and self.distill.teacher:
            raise ValueError(
                "config.distill.teacher and config.token_labels are two recipes: choose one of them."
            )
        self._check_annotator()
        self._check_loss_weights()
        self._check_bce()
        self._check_padded_crop()
        self._check_randaugment()
        if self.optim.min_lr > self.optim.learning_rate > 0:
            raise ValueError(
                f"config.optim.min_lr is {self.optim.min_lr:g}, above the peak, config.optim.learning_rate="
                f"{self.optim.learning_rate:g}."
            )

    def _check_segmentation(self) -> None:
        """Refuses settings of classification, which a segmentation run would not use."""
        augment = self.augment
        unused = {
            "token_labels": self.token_labels,
            "distill.teacher": self.distill.teacher,
            "augment.randaugment": augment.randaugment,
            "augment.three_augment": augment.three_augment,
            "augment.color_jitter": augment.color_jitter,
            "augment.random_erasing": augment.random_erasing,
            "augment.mixup": augment.mixup,
            "augment.cutmix": augment.cutmix,
        }
        for name, value in unused.items():
            if value:
                raise ValueError(
                    f'config.{name} is {value!r}, but config.task="segmentation" does not use it. Set it to '
                    f"{type(value)()!r}, or start from the recipe upernet_lvvit."
                )

    def _check_annotator(self) -> None:
        data = self.data
        if data.annotator_image_size and not data.annotator:
            raise ValueError("config.data.annotator_image_size is set, but config.data.annotator is empty.")
        if not data.annotator:
            return
        if data.score_maps:
            raise ValueError(
                f"config.data.score_maps is {data.score_maps} and config.data.annotator is {data.annotator}: "
                "token labels come from one of them, stored or computed in every step. Leave one out."
            )
        if not self.token_labels:
            raise ValueError(
                f"config.data.annotator is {data.annotator}, but config.token_labels is off. Set "
                "config.token_labels=True, or leave the annotator out."
            )
        if not self.needs_maps:
            raise ValueError(
                f"config.data.annotator is {data.annotator}, but nothing learns from it: "
                "config.loss.dense_weight is 0 and config.loss.cls_target is label. Change one, or leave the "
                "annotator out."
            )
        if data.label_crop != "aligned":
            raise ValueError(
                f"config.data.label_crop={data.label_crop} is a way to sample stored score maps. The labels "
                "of config.data.annotator are always aligned."
            )

    def _check_loss_weights(self) -> None:
        loss = self.loss
        if self.token_labels and loss.dense_weight == loss.cls_weight == 0:
            raise ValueError(
                "config.loss.dense_weight and config.loss.cls_weight are both 0: there is nothing to learn."
            )
        if not (self.token_labels or self.distill.teacher or loss.cls_weight):
            raise ValueError(
                "config.loss.cls_weight is 0 and config.token_labels is off: there is nothing to learn."
            )

    def _check_bce(self) -> None:
        loss = self.loss
        if loss.kind != "bce":
            return
        if self.token_labels or self.distill.teacher:
            name = "token_labels" if self.token_labels else "distill.teacher"
            raise ValueError(f'config.loss.kind="bce" is for image labels, but config.{name} is set.')
        if loss.bce_threshold == 0 and loss.label_smoothing > 0:
            raise ValueError(
                f"config.loss.label_smoothing={loss.label_smoothing:g} makes every target positive, and "
                "config.loss.bce_threshold=0 would turn all of them into 1. Set "
                "config.loss.label_smoothing=0, or a threshold between the two."
            )

    def _check_randaugment(self) -> None:
        augment = self.augment
        changed = {
            "order": (augment.order, "crop_first"),
            "randaugment_interpolation": (augment.randaugment_interpolation, "bilinear"),
        }
        for name, (value, other) in changed.items():
            if augment.randaugment and augment.randaugment_on == "device" and value != other:
                raise ValueError(
                    f"config.augment.{name}={value} is for RandAugment on the host, but "
                    f"config.augment.randaugment_on is device. Set one of them to {other} or host."
                )

    def _check_padded_crop(self) -> None:
        augment = self.augment
        if augment.crop != "padded":
            return
        if augment.padding_mode == "reflect" and augment.crop_padding >= min(self.image_size):
            raise ValueError(
                f"config.augment.crop_padding={augment.crop_padding} mirrors more than an image of "
                f"{self.image_size[0]}x{self.image_size[1]} pixels has: choose less than "
                f"{min(self.image_size)}."
            )
        if augment.order == "published":
            raise ValueError(
                "config.augment.order=published takes a random resized crop, but config.augment.crop is "
                "padded. Use order=crop_first."
            )
        if self.data.label_crop == "published":
            raise ValueError(
                "config.data.label_crop=published belongs to random resized crops, but config.augment.crop "
                "is padded. Use label_crop=aligned."
            )

    @property
    def learns_patches(self) -> bool:
        """Whether the patch tokens learn from score maps. Otherwise the class token alone learns."""
        return self.token_labels and self.loss.dense_weight > 0

    @property
    def needs_maps(self) -> bool:
        """Whether a target is computed from score maps or an annotator."""
        return self.learns_patches or (self.token_labels and self.loss.cls_target != "label")

    @property
    def total_epochs(self) -> int:
        """Length of the run without `steps`: the schedule and the cooldown."""
        return self.epochs + self.cooldown_epochs

    def total_steps(self, steps_per_epoch: int) -> int:
        """Length of the run in steps."""
        return self.steps or self.total_epochs * steps_per_epoch

    def schedule_epochs(self, steps_per_epoch: int) -> float:
        """Length of the learning-rate schedule in epochs."""
        return self.steps / steps_per_epoch if self.steps else self.epochs

    @property
    def crop_size(self) -> tuple[int, int]:
        """(height, width) of the training images of a batch."""
        size = self.segmentation.crop_size if self.task == "segmentation" else ()
        return (size[0], size[1]) if size else self.image_size

    @property
    def eval_batch_size(self) -> int:
        """Images in an evaluation batch."""
        return self.eval.batch_size or self.batch_size


def default() -> Any:
    """All settings with their defaults as an `ml_collections.ConfigDict`, which recipes edit.

    Example:
      >>> config = tlvit.config.default()
      >>> config.batch_size = 512
      >>> config.model.options.drop_path = 0.1
    """
    from ml_collections import ConfigDict

    return ConfigDict(to_dict(Config()))


def resolve(config: Any) -> Config:
    """Turns a `ConfigDict` or nested dict into a `Config`; settings that are left out have their defaults.

    Raises:
      ValueError: an unknown setting (the closest known name is given), a value out of its range, or settings
        that exclude each other.
    """
    return _build(Config, config.to_dict() if hasattr(config, "to_dict") else config)


def to_dict(config: Config) -> dict[str, Any]:
    """The nested dict that `resolve` reads."""
    return dataclasses.asdict(config)


def settings() -> list[tuple[str, Any, str, str]]:
    """(name, default, range, meaning) of every setting, in order; the settings page is made from this."""
    rows = []
    sections = [_section_class(field) for field in dataclasses.fields(Config)]
    for section in (Config, *filter(None, sections)):
        for field in dataclasses.fields(section):
            if field.metadata:
                name = section.prefix.removeprefix("config.") + field.name
                value = getattr(section(), field.name)
                rows.append((name, value, range_text(field.metadata), field.metadata["meaning"]))
    return rows


def check_variant(recipe: str, variant: str, known: Iterable[str]) -> None:
    """Refuses a variant (the text after the colon of --config=RECIPE:VARIANT) that a recipe does not have.

    Raises:
      ValueError: names the variants that it has.
    """
    if variant not in known:
        raise ValueError(
            f"{recipe}:{variant} is not a variant of {recipe}; choose one of {', '.join(known)}."
        )


def parse_image_size(size: int | str | tuple[int, ...] | list[int]) -> tuple[int, int]:
    """(height, width) of 224, "224", "384x256" or a pair.

    Raises:
      ValueError: anything else.
    """
    parts = size.lower().split("x") if isinstance(size, str) else size
    parts = list(parts) if isinstance(parts, list | tuple) else [parts]
    parts = [int(p) if isinstance(p, str) and p.strip().isdecimal() else p for p in parts]
    if len(parts) not in (1, 2) or not all(type(p) is int and p > 0 for p in parts):
        raise ValueError(f"An image size is one number or HEIGHTxWIDTH, not {size!r}.")
    if max(parts) > MAX_IMAGE_SIZE:
        raise ValueError(f"An image size is at most {MAX_IMAGE_SIZE} pixels, not {max(parts)}.")
    return parts[0], parts[-1]


def setting_types() -> dict[str, Any]:
    """Name, such as "optim.learning_rate", -> type of every setting."""
    types = {}
    for field in dataclasses.fields(Config):
        section = _section_class(field)
        inner = annotations(section) if section else {}
        types |= {f"{field.name}.{name}": kind for name, kind in inner.items()}
        types |= {} if section else {field.name: annotations(Config)[field.name]}
    return types


def unknown_setting(name: str) -> str:
    """The message about a setting that does not exist, with the closest ones.

    Args:
      name: such as "optim.lr". The closest have the same last part, its initials, or nearly its spelling.
    """
    known, key = setting_types(), name.rpartition(".")[2]
    inside = [setting for setting in known if setting.startswith(name + ".")]
    if inside:
        return f"config.{name} is a section; its settings are {', '.join(inside)}."
    by_key = {setting.rpartition(".")[2]: setting for setting in reversed(known)}
    same_key = [setting for setting in known if setting.rpartition(".")[2] == key]
    close = difflib.get_close_matches(name, same_key, n=1, cutoff=0)
    close += [setting for k, setting in by_key.items() if "".join(w[0] for w in k.split("_")) == key]
    close += difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    close += [by_key[k] for k in difflib.get_close_matches(key, by_key, n=1, cutoff=0.7)]
    if close:
        return f"config.{name} is not a setting; did you mean config.{close[0]}?"
    section = name.rpartition(".")[0]
    names = [setting for setting in known if setting.rpartition(".")[0] == section] or list(known)
    return f"config.{name} is not a setting; known: {', '.join(names)}."


def _section_class(field: dataclasses.Field) -> type[Section] | None:
    """The class of a field that holds a section; None for a setting."""
    made_by = field.default_factory
    return made_by if isinstance(made_by, type) and issubclass(made_by, Section) else None


def _build(section: type[Section], values: Mapping[str, Any]) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{section.prefix.rstrip('.')} must be a section of settings, not {values!r}.")
    fields = {field.name: field for field in dataclasses.fields(section)}
    for name in values:
        if name not in fields:
            raise ValueError(unknown_setting(section.prefix.removeprefix("config.") + str(name)))
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        nested = _section_class(fields[name])
        if nested is not None:
            arguments[name] = _build(nested, value)
        elif name.endswith("image_size"):
            arguments[name] = parse_image_size(value) if value else ()
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return section(**arguments)
