"""The interface of every model: its capabilities and its methods."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tlvit.shapes import Float
from tlvit.types import Array, ModelOutput


class Model(nnx.Module):
    """Base class of all models. Images are float32 and normalized.

    The attributes declare what a model can do. Code asks them before it calls a method.

    Attributes:
      task: what the model is trained for, "classification" or "segmentation".
      grid: (h, w) of the patch tokens that the model is built for. None for convolutional networks, which
        take images of any size and have no tokens to mix.
    """

    task: str = "classification"
    grid: tuple[int, int] | None = None

    @property
    def has_token_head(self) -> bool:
        """Whether the output has logits of every patch token."""
        return False

    @property
    def has_distillation_token(self) -> bool:
        """Whether the output has logits of a distillation token."""
        return False

    @property
    def has_dense_logits(self) -> bool:
        """Whether `dense_logits` works, so that the model can annotate images."""
        return False

    def __call__(self, images: Float[Array, "B H W 3"], *, key: jax.Array | None = None) -> ModelOutput:
        """Runs the model. `key` is the PRNG key of dropout and drop-path. Nothing is dropped without one."""
        raise NotImplementedError

    def features(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        """The last feature map."""
        raise NotImplementedError

    def pooled_features(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """One vector for each image: the input of the classifier."""
        raise NotImplementedError

    def dense_logits(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w L"]:
        """The logits of every patch or cell, in float32."""
        raise NotImplementedError

    def intermediates(
        self, images: Float[Array, "B H W 3"], blocks: Sequence[int]
    ) -> list[Float[Array, "B _ _ _"]]:
        """The feature maps after some of the blocks (transformers) or stages (convolutional networks)."""
        raise NotImplementedError


def check_images(images: Float[Array, "B H W 3"]) -> None:
    """Checks what type and shape can tell: pixels as they are in a file are not the input of a model.

    Raises:
      ValueError: the images are integers or not [B, H, W, 3].
    """
    if not jnp.issubdtype(images.dtype, jnp.floating) or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"Images must be normalized floats [B, H, W, 3], not {images.dtype} {list(images.shape)}. From "
            "uint8 pixels: (pixels / 255 - mean) / std, with mean and std of info.preprocessing."
        )


def check_indices(indices: Sequence[int], count: int) -> None:
    """Checks the indices of blocks or stages.

    Raises:
      ValueError: an index is not in [0, count).
    """
    wrong = [i for i in indices if not 0 <= i < count]
    if wrong:
        raise ValueError(f"Indices must be in 0..{count - 1}, not {', '.join(map(str, wrong))}.")
