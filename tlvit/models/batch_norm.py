"""Batch normalization with PyTorch's conventions."""

import jax
import jax.numpy as jnp
from flax import nnx

from tlvit.shapes import Float
from tlvit.types import Array, Dtype


class BatchNorm(nnx.Module):
    """Batch normalization over all axes but the last (Ioffe and Szegedy 2015, arXiv:1502.03167).

    In training mode the statistics are those of the global batch, computed in float32. The running statistics
    move toward them by `momentum`. The running variance is the unbiased one, as in PyTorch (Flax keeps the
    biased one). `nnx.view(model, use_running_average=False)` gives a model in training mode.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-5, momentum: float = 0.1, dtype: Dtype = None):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.mean = nnx.BatchStat(jnp.zeros((width,)))
        self.var = nnx.BatchStat(jnp.ones((width,)))
        self.epsilon, self.momentum, self.dtype = epsilon, momentum, dtype
        self.use_running_average = True

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Normalizes `x`. The result has the compute dtype."""
        x = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            mean, var = self._batch_statistics(x)
        shape = (1,) * (x.ndim - 1) + (-1,)
        factor = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        y = x * factor.reshape(shape) + (self.bias[...] - mean * factor).reshape(shape)
        return y.astype(self.dtype) if self.dtype else y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode. `nnx.view` calls it."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _batch_statistics(self, x: Array) -> tuple[Array, Array]:
        """Mean and biased variance of the batch. Updates the running statistics.

        Raises:
          ValueError: there is one value per channel, so that the variance is 0.
        """
        axes = tuple(range(x.ndim - 1))
        count = x.size // x.shape[-1]
        if count == 1:
            raise ValueError(
                f"BatchNorm cannot be trained with one value per channel, shape {list(x.shape)}: "
                "use more than one image in a batch."
            )
        # Both sums in one pass over `x`: jnp.var passes over it again, and once more for its gradient. The
        # running mean is near that of the batch, so that the difference of squares below is accurate.
        running = self.mean[...]
        distance = x - jnp.expand_dims(running, axes)
        shift = jnp.mean(distance, axes)
        mean, var = running + shift, jnp.maximum(jnp.mean(jnp.square(distance), axes) - jnp.square(shift), 0)
        m = self.momentum
        self.mean[...] = (1 - m) * self.mean[...] + m * mean
        self.var[...] = (1 - m) * self.var[...] + m * var * (count / (count - 1))
        return mean, var
