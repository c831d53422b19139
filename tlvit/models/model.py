"""The interface of every model: what it can do, and the methods that do it."""

from flax import nnx

from tlvit.types import Array


class Model(nnx.Module):
    """Base class of all models. Call one with normalized images [B, H, W, 3] to get a ModelOutput.

    The attributes say what a model can do. Code asks them before it asks the model.

    Attributes:
      grid: (h, w) of the patch tokens that the model is built for. None for convolutional networks, which take
        images of any size and have no tokens to mix.
      has_token_head: whether the output has logits of every patch token.
      has_distillation_token: whether the output has logits of a distillation token.
      has_dense_logits: whether `dense_logits` works, so that the model can annotate images.
    """

    grid: tuple[int, int] | None = None
    has_token_head: bool = False
    has_distillation_token: bool = False
    has_dense_logits: bool = False

    def features(self, images: Array) -> Array:
        """[B, H, W, 3] -> the last feature map, [B, h, w, D]."""
        raise NotImplementedError

    def dense_logits(self, images: Array) -> Array:
        """[B, H, W, 3] -> float32 logits of every token or cell, [B, h, w, L]."""
        raise NotImplementedError
