"""The data types that every layer shares: batch, score maps, targets, model output and MixToken mask.

Letters for axes: B batch, H W image height and width, C channels, N tokens, D embedding width, P prefix
tokens (class and distillation token), K classes kept for each cell, L classes, h w token grid or score-map
grid, S shards of the batch, R labels of one image. All types are frozen dataclasses registered as JAX
pytrees.
"""

import dataclasses
from typing import Any

import jax

Array = Any  # jax.Array, numpy.ndarray, or a ShapeDtypeStruct during abstract evaluation
PyTree = Any

pytree = lambda cls: jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class ScoreMaps:
    """The annotator's K highest logits in every cell of an image.

    Attributes:
      value: float16 [B, K, h, w], raw logits. Classes that are not among the K have logit 0.
      index: uint16 or int32 [B, K, h, w], class indices.
    """

    value: Array
    index: Array


@pytree
class Batch:
    """The images and labels of one step.

    Attributes:
      image: uint8 [B, H, W, 3], RGB, not normalized.
      label: int32 [B], class indices.
      mask: bool [B], False for padding. Evaluation ignores padding; training batches have none.
      maps: ScoreMaps of the B images, or None in a run without token labels.
      geometry: float32 [B, 2, 3]. Maps a point (x, y, 1) of the augmented image to the annotated image, both
        in [0, 1] x [0, 1], x to the right and y down. See `tlvit.ops.geometry`.
      real_labels: int32 [B, R], all correct labels of an image (ImageNet ReaL), padded with -1; None for data
        sets with one label for each image. An image may have no correct label.
    """

    image: Array
    label: Array
    mask: Array
    maps: ScoreMaps | None
    geometry: Array
    real_labels: Array | None = None


@pytree
class TokenTargets:
    """Soft targets. Rows of `cls` and `tokens` sum to 1 + smoothing / L, as published; rows of `label` to 1.

    Attributes:
      cls: float32 [B, L], the annotator's target for the class token.
      tokens: float32 [B, N, L], the annotator's target for every patch token, in row-major order.
      label: float32 [B, L], the smoothed one-hot label.
      weight: float32 [B, N], factor of every token in the dense loss (0: the score map does not cover the
        token), or None for 1 everywhere.
    """

    cls: Array
    tokens: Array
    label: Array
    weight: Array | None = None


@pytree
class ModelOutput:
    """The logits of a model.

    Attributes:
      logits: float32 [B, L], by the model's inference rule (see the model's docstring).
      cls: float32 [B, L], of the class token.
      tokens: float32 [B, N, L], of the patch tokens; None for models without a token head.
      dist: float32 [B, L], of the distillation token; None for models without one.
    """

    logits: Array
    cls: Array
    tokens: Array | None = None
    dist: Array | None = None


@pytree
class MixTokenMask:
    """Which tokens come from the partner image. Image i of a shard of n images is mixed with image n - 1 - i.

    Attributes:
      mask: bool [S, h, w], True where the token comes from the partner.
      lam: float32 [S], fraction of tokens that an image keeps.
    """

    mask: Array
    lam: Array
