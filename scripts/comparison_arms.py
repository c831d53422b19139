"""The trainings that scripts/compare_token_labels.py compares: its arms, and the studies that group them.

An arm is one way of training a student. A study is a table: its arms, what they are compared with, and how
many seeds they get.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs import digits_small

TOKENS, LABELS, SEGMENTATION = "token_labels", "no_token_labels", "segmentation"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
      words: what it is, in a table.
      variant: variant of configs/digits_small.py, or "segmentation" for configs/digits_segmentation.py.
      changes: changes of its settings.
      annotator: accuracy in percent at which the annotator is stopped; None for the end of its training.
      start: the arm whose finished run of the same seed gives the initial weights; empty for new weights.
      teacher: whether the annotator is the teacher of a distilled model.
      scene_size: side of the scenes in pixels, from which crops are resized to the student's image size.
    """

    words: str
    variant: str = TOKENS
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    annotator: int | None = None
    start: str = ""
    teacher: bool = False
    scene_size: int = digits_small.SCENES["size"]


@dataclasses.dataclass(frozen=True)
class Study:
    """A table of the results.

    Attributes:
      arms: its rows, in order: arm -> the arm that it is compared with, or "" for no comparison.
      seeds: number of seeds of every arm.
      metric: name of the metric in its column.
    """

    arms: Mapping[str, str]
    seeds: int
    metric: str = "top-1"


def _family(words: str, name: str, **options: Any) -> dict[str, Arm]:
    """A model that is trained with labels only, and one that is trained with token labels."""
    key = words.lower().replace(" ", "_")
    changes: dict[str, Any] = {"model.name": name, "model.options": {"rule": "class", **options}}
    if name.startswith("t2t"):
        changes["image_size"] = (48, 48)  # its patches are of 16 pixels, so that there are 3x3 tokens
    tokens = {**changes, "model.options": {**changes["model.options"], "token_head": True}}
    return {
        f"{key}_labels": Arm(f"{words}, image labels", LABELS, changes),
        f"{key}_tokens": Arm(f"{words}, token labels", TOKENS, tokens),
    }


T2T = {"dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
DEIT = {"patch_size": 4, "dim": 48, "depth": 3, "num_heads": 4}
RANDAUGMENT = {"augment.randaugment": "rand-m9-n2-mstd0.5-inc1"}
MIXED = {"augment.mixup": 0.8, "augment.cutmix": 1.0}
POOLED = {"loss.dense_weight": 0.0, "loss.cls_target": "annotator"}
TWICE = {"epochs": 2 * digits_small.EPOCHS}
LARGE_SCENE = 3 * digits_small.SCENES["size"]

ARMS: dict[str, Arm] = {
    "labels": Arm("image labels only", LABELS),
    "labels_mixed": Arm("image labels, mixup 0.8 and cutmix 1.0", LABELS, MIXED),
    "labels_twice": Arm("image labels only, twice the epochs", LABELS, TWICE),
    "pooled": Arm(
        "one target for each crop, pooled from its score map (ReLabel)",
        changes=POOLED,
    ),
    "labels_mixed_twice": Arm(
        "image labels, mixup 0.8 and cutmix 1.0, twice the epochs", LABELS, MIXED | TWICE
    ),
    "pooled_twice": Arm("one target for each crop (ReLabel), twice the epochs", changes=POOLED | TWICE),
    "published_crop": Arm(
        "token labels, published (transposed) crop", changes={"data.label_crop": "published"}
    ),
    "aligned": Arm("token labels, aligned"),
    "aligned_twice": Arm("token labels, aligned, twice the epochs", changes=TWICE),
    # The loss.
    "no_mixtoken": Arm("without MixToken", changes={"loss.mixtoken": False}),
    "dense_quarter": Arm("dense weight 0.25", changes={"loss.dense_weight": 0.25}),
    "dense_half": Arm("dense weight 0.5", changes={"loss.dense_weight": 0.5}),
    "cls_annotator": Arm('cls_target="annotator"', changes={"loss.cls_target": "annotator"}),
    "cls_published": Arm('cls_target="published"', changes={"loss.cls_target": "published"}),
    "cls_documented": Arm('cls_target="documented"', changes={"loss.cls_target": "documented"}),
    # The input.
    "batchnorm_quarter": Arm(
        "BatchNorm over 8 images in place of the batch of 32", changes={"optim.accumulate": 4}
    ),
    "large_fast": Arm("scenes of 72 pixels, fast resize", scene_size=LARGE_SCENE),
    "large_antialias": Arm(
        "scenes of 72 pixels, antialiased resize",
        changes={"augment.antialias": True},
        scene_size=LARGE_SCENE,
    ),
    "randaugment_bilinear": Arm("RandAugment, bilinear", changes=RANDAUGMENT),
    "randaugment_bicubic": Arm(
        "RandAugment, bicubic", changes={**RANDAUGMENT, "augment.randaugment_interpolation": "bicubic"}
    ),
    # Annotators that are stopped early; the last one is that of all other arms.
    **{
        f"annotator_{percent}_{target}": Arm(
            f'annotator stopped at about {percent} %, cls_target="{target}"',
            changes={"loss.cls_target": target},
            annotator=percent,
        )
        for percent in (60, 80, 90)
        for target in ("label", "annotator")
    },
    # Other families.
    **_family("DeiT", "deit_small_patch16_224", **DEIT),
    **_family("T2T performer", "t2t_vit_14", **T2T),
    **_family("T2T transformer", "t2t_vit_t_14", **T2T),
    "deit_distilled": Arm(
        "DeiT, image labels and hard distillation from the annotator",
        LABELS,
        {
            "model.name": "deit_small_distilled_patch16_224",
            "model.options": {"rule": "class", **DEIT},
        },
        teacher=True,
    ),
    # Segmentation of the scenes, on backbones of the arms above.
    "segment_scratch": Arm("new weights", SEGMENTATION),
    "segment_labels": Arm("backbone from image labels, trained", SEGMENTATION, start="labels"),
    "segment_aligned": Arm("backbone from token labels, trained", SEGMENTATION, start="aligned"),
    "segment_labels_frozen": Arm(
        "backbone from image labels, frozen",
        SEGMENTATION,
        {"optim.lr_scale": {"backbone/*": 0.0}},
        start="labels",
    ),
    "segment_aligned_frozen": Arm(
        "backbone from token labels, frozen",
        SEGMENTATION,
        {"optim.lr_scale": {"backbone/*": 0.0}},
        start="aligned",
    ),
}


STUDIES: dict[str, Study] = {
    "main": Study(
        {
            "labels": "",
            "labels_twice": "labels",
            "published_crop": "labels",
            "aligned": "labels",
            "aligned_twice": "labels_twice",
        },
        seeds=10,
    ),
    "baselines": Study(
        {
            "labels": "",
            "labels_mixed": "labels",
            "pooled": "labels",
            "labels_twice": "",
            "labels_mixed_twice": "labels_twice",
            "pooled_twice": "labels_twice",
        },
        seeds=10,
    ),
    "alignment": Study({"published_crop": "", "aligned": "published_crop"}, seeds=10),
    "annotators": Study(
        {
            "labels": "",
            **{f"annotator_{p}_{t}": "labels" for p in (60, 80, 90) for t in ("annotator", "label")},
            "cls_annotator": "labels",
            "aligned": "labels",
        },
        seeds=3,
    ),
    "segmentation": Study(
        {
            "segment_scratch": "",
            "segment_labels": "segment_scratch",
            "segment_aligned": "segment_labels",
            "segment_labels_frozen": "",
            "segment_aligned_frozen": "segment_labels_frozen",
        },
        seeds=5,
        metric="mIoU",
    ),
    "loss": Study(
        {
            "aligned": "",
            **dict.fromkeys(
                (
                    "no_mixtoken",
                    "dense_quarter",
                    "dense_half",
                    "cls_annotator",
                    "cls_published",
                    "cls_documented",
                ),
                "aligned",
            ),
        },
        seeds=5,
    ),
    "families": Study(
        {
            "labels": "",
            "aligned": "labels",
            "deit_labels": "",
            "deit_distilled": "deit_labels",
            "deit_tokens": "deit_labels",
            "t2t_performer_labels": "",
            "t2t_performer_tokens": "t2t_performer_labels",
            "t2t_transformer_labels": "",
            "t2t_transformer_tokens": "t2t_transformer_labels",
        },
        seeds=5,
    ),
    "input": Study(
        {
            "aligned": "",
            "batchnorm_quarter": "aligned",
            "large_antialias": "",
            "large_fast": "large_antialias",
            "randaugment_bicubic": "",
            "randaugment_bilinear": "randaugment_bicubic",
        },
        seeds=5,
    ),
}
