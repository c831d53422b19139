"""ReLabel on ImageNet (Yun et al. 2021, arXiv:2101.05022): one target for each crop, from its score map.

    python -m tlvit.main --config=configs/relabel.py --workdir=/runs/relabel \\
        --config.data.score_maps=/data/score_maps
    python -m tlvit.main --config=configs/relabel.py:lvvit_s --workdir=/runs/relabel_lvvit \\
        --config.data.score_maps=/data/score_maps

A baseline between image labels and token labels: the class token learns the score map of the crop, pooled by
RoIAlign, and the patch tokens have no targets. So any model can be trained this way; the variant after the
colon is deit_small_patch16_224, lvvit_s or t2t_vit_14, without a token head. Mixup and cutmix mix the pooled
targets, as in the published ReLabel + CutMix; the learning rate and its schedule, mixup and cutmix are those
of DeiT.

Hardware: 8 GPUs or a TPU v5e-8 at batch 1024. Published top-1 of a ResNet-50: 77.5 % with image labels, 78.9
% with ReLabel, 80.2 % with ReLabel + CutMix. For the models of this recipe no result was published. Measured
with tlvit: nothing yet.
"""

from tlvit.config import check_variant, default

VARIANTS = ("deit_small_patch16_224", "lvvit_s", "t2t_vit_14")


def get_config(variant: str = "deit_small_patch16_224"):
    check_variant("relabel", variant, VARIANTS)
    config = default()
    config.cooldown_epochs = 0
    config.model.name = variant
    config.model.options.drop_path = 0.1
    config.model.options.token_head = False
    config.augment.mixup = 0.8
    config.augment.cutmix = 1.0
    config.loss.dense_weight = 0.0
    config.loss.mixtoken = False
    config.loss.label_smoothing = 0.0
    config.optim.learning_rate = 5e-4
    config.optim.base_batch_size = 512
    config.ema.decay = 0.99996
    return config
