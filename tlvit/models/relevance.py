"""Which patches of an image a vision transformer attends to, and which are relevant for a class."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange

from tlvit.models.model import Model
from tlvit.models.transformer import Block
from tlvit.models.vit import TokenModel
from tlvit.ops.relevance import attention_rollout, gradient_relevance
from tlvit.shapes import Float, Float32, Int
from tlvit.types import Array


def rollout_map(model: Model, images: Float[Array, "B H W 3"]) -> Float32[Array, "B h w"]:
    """Attention rollout from the class token to the patches (`ops.relevance.attention_rollout`).

    Of a model with a distillation token: the mean of both tokens. The attention inside of a T2T-ViT's stem,
    whose tokens are not patches, is not part of it.

    Args:
      model: a vision transformer.
      images: normalized.

    Returns:
      float32, not negative. The rest to a sum of 1 stays in the prefix tokens.

    Raises:
      ValueError: a convolutional model.

    Example:
      >>> rollout = jax.jit(lambda images: rollout_map(model, images))(images)
    """
    model = check_attention(model)
    return _patches(model, attention_rollout(model.attention_maps(images)))


def relevance_map(
    model: Model, images: Float[Array, "B H W 3"], classes: Int[Array, "B K"]
) -> Float32[Array, "B K h w"]:
    """Gradient-weighted relevance of the patches for classes (`ops.relevance.gradient_relevance`).

    The explained logit is that of the class token, and the map its row of R. Of a model with a distillation
    token: the mean of both logits and of both rows. Token heads are not explained; `dense_logits` shows them.

    Args:
      model: a vision transformer.
      images: normalized.
      classes: K class indices for each image.

    Returns:
      float32, not negative. Values of one map can be compared.

    Raises:
      ValueError: a convolutional model.

    Example:
      >>> classes = np.array([[281, 207]])  # of one image
      >>> maps = jax.jit(lambda images: relevance_map(model, images, classes))(images)
    """
    model = check_attention(model)
    maps = model.attention_maps(images)
    zeros = [jnp.zeros_like(attention) for attention in maps]
    logits, transpose = jax.vjp(lambda offsets: class_logits(model, images, offsets), zeros)

    def relevance(chosen: Array) -> Array:
        (gradients,) = transpose(jax.nn.one_hot(chosen, logits.shape[-1], dtype=logits.dtype))
        return _patches(model, gradient_relevance(maps, gradients))

    # One class after the other: the gradients of one have the size of all attention maps.
    return rearrange(jax.lax.map(relevance, jnp.asarray(classes).T), "k b h w -> b k h w")


def class_logits(
    model: TokenModel, images: Float[Array, "B H W 3"], offsets: Sequence[Float[Array, "B heads T T"]]
) -> Float32[Array, "B L"]:
    """The logits of the class token, or the mean with the distillation token's, if something is added to the
    attention weights.

    The gradient with respect to `offsets` at zero is that with respect to the attention weights.

    Args:
      model: a vision transformer.
      images: normalized.
      offsets: for each block with attention, what is added to its weights after the softmax.
    """
    x, remaining = model.embed(images), iter(offsets)
    for block in model.blocks:
        if isinstance(block, Block):
            x = block.with_weights(x, block.attn.weights(block.norm1(x)) + next(remaining))
        else:  # the Transition of a dense T2T-ViT has no attention
            x = block(x)
    x = model.norm(x)
    logits = model.head(x[:, 0])
    if model.head_dist is not None:
        logits = (logits + model.head_dist(x[:, 1])) / 2
    return logits


def check_attention(model: Model) -> TokenModel:
    """Returns the model.

    Raises:
      ValueError: it is not a vision transformer.
    """
    if not isinstance(model, TokenModel):
        raise ValueError(
            f"{type(model).__name__} has no attention: attention and relevance are drawn of vision "
            "transformers (LV-ViT, T2T-ViT, DeiT)."
        )
    return model


def _patches(model: TokenModel, matrix: Float[Array, "B T T"]) -> Float[Array, "B h w"]:
    """The mean of the prefix tokens' rows, at the patches."""
    h, w = model.grid
    prefix = matrix.shape[1] - h * w
    row = jnp.mean(matrix[:, :prefix, prefix:], axis=1)
    return rearrange(row, "b (h w) -> b h w", h=h)
