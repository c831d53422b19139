"""Fine-tunes an LV-ViT on another data set: image labels and MixToken, no score maps (arXiv:2104.10858).

    python -m tlvit.main --config=configs/lvvit_mixtoken.py:lvvit_s --workdir=/runs/lvvit_s_flowers \\
        --config.data.name=/data/flowers --config.data.eval_split=val \\
        --config.model.init_from=lvvit_s.pth.tar

This is the published command for other data sets: --token-label without label data and --dense-weight 0.0.
The class token learns the labels of the two images that MixToken has mixed, by their areas. The variant after
the colon is lvvit_t, lvvit_s, lvvit_m or lvvit_l.

As published: learning rate 1.6e-3 at a batch of 512, 310 epochs, no moving average. The published model keeps
its token head, which nothing trains here, and adds half of its maximum to the logits; this recipe has no
token head. For a small data set, configs/lvvit_folder.py has a lower learning rate and fewer epochs.

Hardware: 8 GPUs or a TPU v5e-8. Published: no result. Measured with tlvit: nothing yet.
"""

from tlvit.config import check_variant, default

DROP_PATH = {"lvvit_t": 0.1, "lvvit_s": 0.1, "lvvit_m": 0.2, "lvvit_l": 0.3}  # as in training


def get_config(variant: str = "lvvit_s"):
    check_variant("lvvit_mixtoken", variant, DROP_PATH)
    config = default()
    config.batch_size = 512
    config.model.name = variant
    config.model.init_required = True
    config.model.init_unexpected = ("aux_head",)
    config.model.options.drop_path = DROP_PATH[variant]
    config.model.options.token_head = False
    config.loss.dense_weight = 0.0
    config.loss.cls_target = "label"
    config.optim.base_batch_size = 512
    config.ema.decay = 0.0
    return config
