"""The forward pass, classifier and squeeze-and-excitation of the convolutional networks RegNetY and NFNet."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tlvit.models.layers import Conv, split_key
from tlvit.models.model import Model, check_images, check_indices
from tlvit.ops.dropout import dropout
from tlvit.shapes import Float
from tlvit.types import Array, Dtype, ModelOutput


class PooledModel(Model):
    """A convolutional network. A subclass sets `head` and defines `stage_outputs` and `final_map`.

    Attributes:
      head: PooledClassifier. Applied to every cell of the last feature map, it gives score maps.
    """

    @property
    def has_dense_logits(self) -> bool:
        """Whether `dense_logits` works. It needs no further head."""
        return True

    def stage_outputs(
        self, images: Float[Array, "B H W 3"], key: jax.Array | None
    ) -> list[Float[Array, "B _ _ _"]]:
        """The feature maps after the stages. `key` is the PRNG key of drop-path."""
        raise NotImplementedError

    def final_map(self, x: Float[Array, "B h w _"]) -> Float[Array, "B h w D"]:
        """The layers between the last stage and the classifier."""
        return x

    def __call__(self, images: Float[Array, "B H W 3"], *, key: jax.Array | None = None) -> ModelOutput:
        """Runs the model.

        Args:
          images: normalized.
          key: PRNG key of dropout and drop-path. Nothing is dropped without one.

        Returns:
          ModelOutput with equal `logits` and `cls`.

        Raises:
          ValueError: the images are not normalized floats.
        """
        body_key, head_key = split_key(key, 2)
        x = self.final_map(self._stages(images, body_key)[-1])
        logits = self.head(x, head_key)
        return ModelOutput(logits=logits, cls=logits)

    def features(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        """The feature map that the classifier averages."""
        return self.final_map(self._stages(images, None)[-1])

    def pooled_features(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """The average of the last feature map."""
        return jnp.mean(self.features(images), axis=(1, 2), dtype=jnp.float32)

    def dense_logits(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w L"]:
        """The classifier's logits of every cell of the last feature map, in float32."""
        return self.head.dense(self.features(images))

    def intermediates(
        self, images: Float[Array, "B H W 3"], blocks: Sequence[int]
    ) -> list[Float[Array, "B _ _ _"]]:
        """The feature maps after some of the stages.

        Args:
          images: normalized.
          blocks: indices of stages; 0 is the first stage after the stem.

        Returns:
          One array for each index, in the order of `blocks`.

        Raises:
          ValueError: an index is out of range.
        """
        outputs = self._stages(images, None)
        check_indices(blocks, len(outputs))
        return [outputs[i] for i in blocks]

    def _stages(self, images: Array, key: jax.Array | None) -> list[Array]:
        """The stages, for images that are checked."""
        check_images(images)
        return self.stage_outputs(images, key)


class PooledClassifier(nnx.Module):
    """A linear classifier for the average of a feature map or for each of its cells."""

    def __init__(
        self, width: int, num_classes: int, *, drop_rate: float = 0.0, dtype: Dtype = None, rngs: nnx.Rngs
    ):  # fmt: skip
        self.drop_rate = drop_rate
        init = nnx.initializers.normal(0.01)
        self.fc = nnx.Linear(
            width, num_classes, kernel_init=init, dtype=dtype, preferred_element_type=jnp.float32, rngs=rngs
        )

    def __call__(
        self, features: Float[Array, "B h w D"], key: jax.Array | None = None
    ) -> Float[Array, "B L"]:
        """The float32 logits of the average cell."""
        pooled = jnp.mean(features, axis=(1, 2), dtype=jnp.float32)
        return self.fc(dropout(pooled, self.drop_rate, key))

    def dense(self, features: Float[Array, "B h w D"]) -> Float[Array, "B h w L"]:
        """The float32 logits of every cell."""
        return self.fc(features)


class SqueezeExcite(nnx.Module):
    """Multiplies every channel by a gate computed from the image's mean (Hu et al. 2018,
    arXiv:1709.01507)."""

    def __init__(self, width: int, squeezed: int, *, dtype: Dtype = None, rngs: nnx.Rngs):
        self.fc1 = Conv(width, squeezed, 1, dtype=dtype, rngs=rngs)
        self.fc2 = Conv(squeezed, width, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        gate = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)
        return x * jax.nn.sigmoid(self.fc2(jax.nn.relu(self.fc1(gate)))).astype(x.dtype)
