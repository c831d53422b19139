"""Every key of a run, its default and what it does; each recipe starts from here.

Set keys on the command line as --config.KEY=VALUE, for example --config.batch_size=512
--config.optim.learning_rate=8e-4.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of initialization, data order, augmentation, drop-path and mixing
    config.batch_size = 1024  # images a step, over all devices
    config.epochs = 300  # length of the cosine
    config.floor_epochs = 10  # further epochs at the lowest learning rate
    config.image_size = (224, 224)  # (height, width); one number on the command line means a square
    config.token_labels = True  # train all tokens on score maps; False: the class token on the labels alone

    config.model = ConfigDict()
    config.model.name = "lvvit_s"  # one of tlvit.list_models()
    config.model.dtype = "bfloat16"  # of the computation; parameters, norms' statistics, losses: float32
    config.model.options = ConfigDict()  # any option of the model class: drop_path, depth, rule, …
    config.model.init_from = ""  # checkpoint to start from: a workdir, a model folder or a PyTorch file

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # a TFDS data set, or "digits" (embedded scenes of handwritten digits)
    config.data.dir = ""  # folder of the TFDS data sets; empty: ~/tensorflow_datasets
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.score_maps = ""  # folder that tlvit.annotate wrote for the training split
    config.data.allow_missing_maps = 0.0  # share of images that may lack a map (their target is their label)
    config.data.max_bad = 0.001  # share of images that may be unreadable; each is replaced by the next one
    config.data.label_crop = "aligned"  # "published": transposed crops of the maps, as the 2021 code had them
    config.data.shuffle_gib = 2.0  # host memory for the shuffle, of encoded images
    config.data.threads = 0  # that decode; 0: one for each core

    config.augment = ConfigDict()
    config.augment.crop_scale = (0.08, 1.0)  # random resized crop: share of the image's area
    config.augment.crop_ratio = (3 / 4, 4 / 3)  # and aspect ratio
    config.augment.flip = 0.5  # probability of a horizontal flip
    config.augment.interpolation = "random"  # "bilinear", "bicubic" or one of them at random
    config.augment.randaugment = "rand-m9-n2-mstd0.5-inc1"  # empty: none
    config.augment.on = "host"  # "device": RandAugment inside the step, for hosts with few cores
    config.augment.three_augment = False  # DeiT III's: gray, solarize or blur
    config.augment.color_jitter = 0.0  # strength of brightness, contrast and saturation
    config.augment.exact_resize = False  # True: Pillow's antialiased resize, at half the speed
    config.augment.repeats = 1  # DeiT: 3 views of an image in a step, a third of the images an epoch
    config.augment.erasing = 0.25  # probability of random erasing (pixel noise), on the device
    config.augment.mixup = 0.0  # alpha; without token labels only
    config.augment.cutmix = 0.0  # alpha; without token labels only

    config.loss = ConfigDict()
    config.loss.smoothing = 0.1  # of labels and token labels
    config.loss.dense_weight = 1.0  # of the patch tokens
    config.loss.cls_weight = 1.0  # of the class token
    config.loss.cls_target = "annotator"  # or "published", "documented", "label"
    config.loss.plain_labels = False  # True: permit labels alone, without token labels, mixup and cutmix
    config.loss.mixtoken = True  # mix tokens within each device's images (with token labels)

    config.distill = ConfigDict()  # of a model with a distillation token, without token labels
    config.distill.teacher = ""  # a workdir, a model folder or a PyTorch file
    config.distill.kind = "hard"  # the teacher's best class; "soft": its probabilities at temperature tau
    config.distill.alpha = 0.5  # share of the teacher in the loss
    config.distill.tau = 1.0  # temperature of the soft kind

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # or "lamb", "sgd"
    config.optim.learning_rate = 1.6e-3  # peak, for a batch of reference_batch; scaled linearly to batch_size
    config.optim.reference_batch = 1024
    config.optim.weight_decay = 0.05  # not on vectors, pos_embed, cls_token
    config.optim.clip_norm = 0.0  # largest global gradient norm; 0: no clipping
    config.optim.warmup_epochs = 5.0
    config.optim.warmup_start = 1e-6  # first learning rates, not scaled with the batch
    config.optim.floor = 1e-5  # lowest learning rate after the warm-up, not scaled
    config.optim.schedule_per = "epoch"  # or "step"
    config.optim.lag_epochs = 0  # DeiT's published loop runs its schedule one epoch late
    config.optim.accumulate = 1  # parts that a batch is run in, for small accelerators

    config.ema = ConfigDict()
    config.ema.decay = 0.99992  # of parameters and statistics; 0: no average
    config.ema.warmup = False  # decay min(decay, (1 + step) / (10 + step)), for short runs

    config.eval = ConfigDict()
    config.eval.every_epochs = 1  # the last step is always evaluated
    config.eval.batch_size = 0  # 0: as in training
    config.eval.image_size = ()  # with --mode=eval, like image_size; empty: as the checkpoint was trained
    config.eval.crop_pct = 0.9  # the image is resized to size / crop_pct, then center-cropped
    config.eval.interpolation = "bicubic"
    config.eval.max_bad = 0.0  # share of the evaluation images that may be unreadable; they are left out

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1  # the last step is always saved
    config.checkpoint.keep = 3  # latest ones, beside the best

    config.log_every = 50  # steps between progress lines
    return config
