"""What RegNetY and NFNet share: squeeze-and-excitation and the pooled classifier."""

import jax
import jax.numpy as jnp
from flax import nnx

from tlvit.models.layers import conv, dropout, split_key
from tlvit.models.model import Model
from tlvit.types import Array, ModelOutput


class SqueezeExcite(nnx.Module):
    """Channel gates from the mean over the image (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, width: int, squeezed: int, *, dtype=None, rngs: nnx.Rngs):
        self.fc1 = conv(width, squeezed, 1, dtype=dtype, rngs=rngs)
        self.fc2 = conv(squeezed, width, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        gate = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)
        return x * jax.nn.sigmoid(self.fc2(jax.nn.relu(self.fc1(gate)))).astype(x.dtype)


class PooledClassifier(nnx.Module):
    """The head of the convolutional families: one linear classifier for the pooled map or for every cell."""

    def __init__(
        self, width: int, num_classes: int, *, drop_rate: float = 0.0, dtype=None, rngs: nnx.Rngs
    ):  # fmt: skip
        self.drop_rate = drop_rate
        init = nnx.initializers.normal(0.01)
        self.fc = nnx.Linear(width, num_classes, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, features: Array, key: Array | None = None) -> Array:
        """[B, h, w, D] -> float32 [B, L]."""
        pooled = jnp.mean(features, axis=(1, 2), dtype=jnp.float32)
        return self.fc(dropout(pooled, self.drop_rate, key)).astype(jnp.float32)

    def dense(self, features: Array) -> Array:
        """[B, h, w, D] -> float32 [B, h, w, L]."""
        return self.fc(features).astype(jnp.float32)


class PooledModel(Model):
    """A convolutional network: a subclass sets `head`, a PooledClassifier, and says in `encode` what precedes
    it."""

    has_dense_logits = True

    def encode(self, images: Array, key: Array | None) -> Array:
        """[B, H, W, 3] -> the last feature map, [B, h, w, D]."""
        raise NotImplementedError

    def __call__(self, images: Array, *, key: Array | None = None) -> ModelOutput:
        """Normalized float32 [B, H, W, 3] -> ModelOutput with logits and cls, which are the same."""
        keys = split_key(key, 2)
        logits = self.head(self.encode(images, keys[0]), keys[1])
        return ModelOutput(logits=logits, cls=logits)

    def features(self, images: Array) -> Array:
        """The last feature map, [B, h, w, D]."""
        return self.encode(images, None)

    def dense_logits(self, images: Array) -> Array:
        """The classifier's logits of every cell of the last feature map, float32 [B, h, w, L]: score maps."""
        return self.head.dense(self.features(images))
