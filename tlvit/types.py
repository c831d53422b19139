"""The data types that every layer shares: batch, score maps, targets, model output and MixToken mask.

Letters for axes: B batch, H W image height and width, C channels, N tokens, D embedding width, P prefix
tokens (class and distillation token), K classes kept for each cell, L classes, h w token grid or score-map
grid, S shards of the batch, R labels of one image. All types are frozen dataclasses registered as JAX
pytrees.

Annotations name the type and the axes of an array, for example `Float[Array, "B N L"]`. A program does not
check them; the tests check those of functions (see tests/conftest.py). During a tree_map or an abstract
evaluation a field may hold something other than an array, for example a sharding.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from tlvit.shapes import Bool, Float, Float16, Float32, Int32, UInt8, UInt16

Array = jax.Array | np.ndarray
PyTree = Any
Dtype = DTypeLike | None  # of a computation; None: that of the input and the parameters
IGNORE = 255  # class of the pixels that do not count, in `Batch.segmentation`

pytree = lambda cls: jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class ScoreMaps:
    """The annotator's K highest logits in every cell of an image.

    Attributes:
      value: logits, as the annotator computed them. Classes that are not among the K have logit 0.
      index: class indices of the logits.

    Example:
      >>> maps = ScoreMaps(value=np.zeros((1, 5, 8, 8), np.float16), index=np.zeros((1, 5, 8, 8), np.uint16))
      >>> maps.value.shape  # one image, 5 classes in each of 8 x 8 cells
      (1, 5, 8, 8)
    """

    value: Float16[Array, "B K h w"]
    index: UInt16[Array, "B K h w"] | Int32[Array, "B K h w"]


@pytree
class Batch:
    """The images and labels of one step.

    Attributes:
      image: RGB in 0 to 255, not normalized.
      label: class indices.
      mask: False for padding. Evaluation ignores padding; training batches have none.
      maps: score maps of the B images, or None in a run without token labels.
      geometry: maps a point (x, y, 1) of the augmented image to the annotated image, both in [0, 1] x [0, 1],
        x to the right and y down. See `tlvit.ops.geometry`. If the training step scores the augmented images
        itself, the annotated image is the crop, before rotations, shears and translations.
      real_labels: all correct labels of an image (ImageNet ReaL), padded with -1; None for data sets with one
        label for each image. An image may have no correct label.
      segmentation: in segmentation the class of every pixel, IGNORE for pixels that do not count, and `label`
        is 0; None in classification.

    Example:
      >>> batch = Batch(
      ...     image=np.zeros((2, 32, 32, 3), np.uint8),
      ...     label=np.array([3, 1], np.int32),
      ...     mask=np.ones(2, bool),
      ...     maps=None,
      ...     geometry=np.tile(np.eye(2, 3, dtype=np.float32), (2, 1, 1)),  # not augmented
      ... )
      >>> batch.image.shape
      (2, 32, 32, 3)
    """

    image: UInt8[Array, "B H W 3"]
    label: Int32[Array, " B"]
    mask: Bool[Array, " B"]
    maps: ScoreMaps | None
    geometry: Float32[Array, "B 2 3"]
    real_labels: Int32[Array, "B R"] | None = None
    segmentation: UInt8[Array, "B H W"] | None = None


@pytree
class TokenTargets:
    """Soft targets. Rows of `cls` and `tokens` sum to 1 + smoothing / L, as published; rows of `label` to 1.

    Attributes:
      cls: the annotator's target for the class token.
      tokens: the annotator's target for every patch token, in row-major order.
      label: the smoothed one-hot label.
      weight: factor of every token in the dense loss: the fraction of the token that the score map covers.
        None is 1 everywhere.

    Example:
      >>> one_hot = np.eye(10, dtype=np.float32)[[3, 1]]
      >>> targets = TokenTargets(cls=one_hot, tokens=one_hot[:, None].repeat(196, 1), label=one_hot)
      >>> targets.tokens.shape
      (2, 196, 10)
    """

    cls: Float32[Array, "B L"]
    tokens: Float32[Array, "B N L"]
    label: Float32[Array, "B L"]
    weight: Float32[Array, "B N"] | None = None


@pytree
class ModelOutput:
    """The logits of a model.

    Attributes:
      logits: by the model's inference rule (see the model's docstring).
      cls: of the class token.
      tokens: of the patch tokens, in row-major order; None for models without a token head.
      dist: of the distillation token; None for models without one.

    Example:
      >>> logits = np.zeros((2, 10), np.float32)
      >>> ModelOutput(logits=logits, cls=logits).tokens is None
      True
    """

    logits: Float[Array, "B L"]
    cls: Float[Array, "B L"]
    tokens: Float[Array, "B N L"] | None = None
    dist: Float[Array, "B L"] | None = None


@pytree
class SegmentationOutput:
    """The logits of a segmentation model.

    Attributes:
      logits: of the decode head, at the resolution of its finest feature map: in UperNet a quarter of that of
        the image.
      aux: of the auxiliary head, which is used in training only; None for models without one.

    Example:
      >>> output = SegmentationOutput(
      ...     logits=np.zeros((2, 128, 128, 150), np.float32), aux=np.zeros((2, 32, 32, 150), np.float32)
      ... )
    """

    logits: Float[Array, "B h w L"]
    aux: Float[Array, "B _ _ L"] | None = None


@pytree
class MixTokenMask:
    """Which tokens come from the partner image. Image i of a shard of n images is mixed with image n - 1 - i.

    Attributes:
      mask: True where the token comes from the partner.
      lam: fraction of tokens that an image keeps.

    Example:
      >>> mask = np.zeros((1, 2, 2), bool)
      >>> mask[0, 0, 0] = True
      >>> mix = MixTokenMask(mask=mask, lam=np.array([0.75], np.float32))
    """

    mask: Bool[Array, "S h w"]
    lam: Float32[Array, " S"]
