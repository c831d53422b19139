"""The words of the rest: what a batch, a score map, a target and a model output are.

Letters used for shapes everywhere: B batch, H W image, C channels, N tokens, D width, K top-k, L classes, h w
grid of tokens or of a map, S shards of the batch. All types are frozen dataclasses that JAX sees as pytrees.
"""

import dataclasses
from typing import Any

import jax

Array = Any  # jax.Array, numpy.ndarray, or a ShapeDtypeStruct of abstract evaluation
PyTree = Any

pytree = lambda cls: jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class ScoreMaps:
    """The annotator's K best classes of every cell of an image, as raw logits.

    Attributes:
      value: float16 [B, K, h, w], raw logits. Classes that are not among the K count as logit 0.
      index: uint16 or int32 [B, K, h, w], class indices.
    """

    value: Array
    index: Array


@pytree
class Batch:
    """What the host sends to the devices for a step.

    Attributes:
      image: uint8 [B, H, W, 3], RGB, not normalised.
      label: int32 [B].
      mask: bool [B]; False marks padding, which evaluation leaves out; training batches have none.
      maps: ScoreMaps of the B images, or None in a run without token labels.
      geometry: float32 [B, 2, 3]; maps a point (x, y, 1) of the final image to the source image that the
        score map covers, both in [0, 1] x [0, 1], x to the right and y down.
      real: int32 [B, R], all labels that are right for an image, padded with -1 (ReaL; an image may have
        none), or None where the data have single labels only.
    """

    image: Array
    label: Array
    mask: Array
    maps: ScoreMaps | None
    geometry: Array
    real: Array | None = None


@pytree
class TokenTargets:
    """Soft targets; rows of `cls` and `tokens` sum to 1 + smoothing / L as published, `truth` sums to 1.

    Attributes:
      cls: float32 [B, L], the annotator's target for the class token.
      tokens: float32 [B, N, L], its target for every patch token, in row-major order of the grid.
      truth: float32 [B, L], the smoothed one-hot label.
    """

    cls: Array
    tokens: Array
    truth: Array


@pytree
class ModelOutput:
    """Attributes:
    logits: float32 [B, L] by the model's rule of inference (see each model's docstring).
    cls: float32 [B, L] of the class token.
    tokens: float32 [B, N, L] of the patch tokens, or None for models without a token head.
    dist: float32 [B, L] of the distillation token, or None.
    """

    logits: Array
    cls: Array
    tokens: Array | None = None
    dist: Array | None = None


@pytree
class MixTokenMask:
    """Which tokens come from the partner image; the partner of image i of a shard is image B/S - 1 - i.

    Attributes:
      mask: bool [S, h, w], True where a token is the partner's.
      lam: float32 [S], the share of tokens that stay the image's own.
    """

    mask: Array
    lam: Array
