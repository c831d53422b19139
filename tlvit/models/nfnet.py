"""NFNet (Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization",
arXiv:2102.06171): the annotators of the published score maps."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from tlvit.models.convnet import PooledClassifier, PooledModel, SqueezeExcite
from tlvit.models.layers import check_widths, drop_path, drop_path_rates, gelu, run_block, split_key
from tlvit.shapes import Float
from tlvit.types import Array, Dtype

GELU_GAIN = 1.7015043497085571  # keeps the variance of a unit normal input, as published
SQUEEZE_GAIN = 2.0  # compensates for the gates of squeeze-and-excitation, which are about 0.5

# As published: (1, 2, 6, 3) blocks in the four stages, n + 1 times for F<n>.
VARIANTS = {f"dm_nfnet_f{n}": {"depths": tuple((n + 1) * d for d in (1, 2, 6, 3))} for n in range(7)}


class NFNet(PooledModel):
    """Pre-activation bottlenecks without normalization layers. The weights of the convolutions are
    standardized.

    The model takes images of any size. `image_size` is not used; all models have this option. The overall
    stride is 32. Published image sizes in training and evaluation: F0 192 and 256, F1 224 and 320, F2 256 and
    352, F3 320 and 416, F4 384 and 512, F5 416 and 544, F6 448 and 576.
    """

    def __init__(
        self, *, num_classes: int = 1000, image_size: int | tuple[int, int] = 224, depths: tuple[int, ...],
        widths: tuple[int, ...] = (256, 512, 1536, 1536), stem_width: int = 128, group_width: int = 128,
        alpha: float = 0.2, drop_rate: float = 0.0, drop_path: float = 0.0, remat: bool = False,
        dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        if len(depths) != len(widths):
            raise ValueError(
                f"Every stage needs a depth and a width, not {tuple(depths)} and {tuple(widths)}."
            )
        self.num_classes, self.remat = num_classes, remat
        self.stem = Stem(stem_width, dtype=dtype, rngs=rngs)
        rates = drop_path_rates(drop_path, sum(depths))
        width_in, variance, stages = stem_width, 1.0, []
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            stage = []
            for j, rate in enumerate(rates[sum(depths[:i]) :][:depth]):
                block = Bottleneck(
                    width_in, width, stride=2 if i and not j else 1, group_width=group_width, alpha=alpha,
                    beta=variance**-0.5, drop_path=rate, dtype=dtype, rngs=rngs,
                )  # fmt: skip
                stage.append(block)
                # Every block adds alpha^2 to the variance. The first of a stage resets it to 1 + alpha^2.
                variance = (variance if j else 1.0) + alpha**2
                width_in = width
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)
        self.final_conv = ScaledConv(width_in, 2 * width_in, 1, dtype=dtype, rngs=rngs)
        self.head = PooledClassifier(2 * width_in, num_classes, drop_rate=drop_rate, dtype=dtype, rngs=rngs)

    def stage_outputs(
        self, images: Float[Array, "B H W 3"], key: jax.Array | None
    ) -> list[Float[Array, "B _ _ _"]]:
        """The feature maps after the stages. `key` is the PRNG key of drop-path."""
        keys = iter(split_key(key, sum(len(stage) for stage in self.stages)))
        x, outputs = self.stem(images), []
        for stage in self.stages:
            for block in stage:
                x = run_block(block, x, next(keys), remat=self.remat)
            outputs.append(x)
        return outputs

    def final_map(self, x: Float[Array, "B h w _"]) -> Float[Array, "B h w D"]:
        """A 1x1 convolution that doubles the channels, and GELU."""
        return scaled_gelu(self.final_conv(x))


def scaled_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU times its gain, which keeps the variance."""
    return gelu(x) * GELU_GAIN


class Stem(nnx.Module):
    """Four 3x3 convolutions, the first and the last with stride 2."""

    def __init__(self, width: int, *, dtype: Dtype = None, rngs: nnx.Rngs):
        self.conv1 = ScaledConv(3, width // 8, 3, stride=2, dtype=dtype, rngs=rngs)
        self.conv2 = ScaledConv(width // 8, width // 4, 3, dtype=dtype, rngs=rngs)
        self.conv3 = ScaledConv(width // 4, width // 2, 3, dtype=dtype, rngs=rngs)
        self.conv4 = ScaledConv(width // 2, width, 3, stride=2, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        """Returns [B, ceil(H / 4), ceil(W / 4), width]."""
        x = scaled_gelu(self.conv1(images))
        x = scaled_gelu(self.conv2(x))
        x = scaled_gelu(self.conv3(x))
        return self.conv4(x)


class Bottleneck(nnx.Module):
    """Computes shortcut + alpha * gain * branch(beta * x).

    beta scales the input of the branch to variance 1. The learned gain ("skip-init") starts at zero.
    """

    def __init__(
        self, width_in: int, width: int, *, stride: int, group_width: int, alpha: float, beta: float,
        drop_path: float, dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.alpha, self.beta, self.drop_path = alpha, beta, drop_path
        groups = max(1, width // 2 // group_width)
        middle = groups * min(group_width, width // 2)
        options = {"dtype": dtype, "rngs": rngs}
        project = stride != 1 or width_in != width
        self.downsample = Downsample(width_in, width, stride=stride, **options) if project else None
        self.conv1 = ScaledConv(width_in, middle, 1, **options)
        self.conv2 = ScaledConv(middle, middle, 3, stride=stride, groups=groups, **options)
        self.conv2b = ScaledConv(middle, middle, 3, groups=groups, **options)
        self.conv3 = ScaledConv(middle, width, 1, **options)
        self.attn_last = SqueezeExcite(width, width // 2, **options)
        self.skipinit_gain = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Float[Array, "B H W C"], key: jax.Array | None = None) -> Float[Array, "B h w D"]:
        """Returns [B, ceil(H / stride), ceil(W / stride), width]."""
        branch = scaled_gelu(x) * self.beta
        shortcut = x if self.downsample is None else self.downsample(branch)
        branch = self.conv2(scaled_gelu(self.conv1(branch)))
        branch = self.conv3(scaled_gelu(self.conv2b(scaled_gelu(branch))))
        branch = drop_path(SQUEEZE_GAIN * self.attn_last(branch), self.drop_path, key)
        return branch * (self.alpha * self.skipinit_gain[...]).astype(branch.dtype) + shortcut


class Downsample(nnx.Module):
    """Average pooling by the stride, of the cells inside the image, then a 1x1 convolution."""

    def __init__(self, width_in: int, width: int, *, stride: int, dtype: Dtype = None, rngs: nnx.Rngs):
        self.stride = stride
        self.conv = ScaledConv(width_in, width, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        if self.stride != 1:
            window = (1, self.stride, self.stride, 1)
            total = lambda y: jax.lax.reduce_window(y, 0.0, jax.lax.add, window, window, "SAME")
            x = (total(x.astype(jnp.float32)) / total(jnp.ones(x.shape, jnp.float32))).astype(x.dtype)
        return self.conv(x)


class ScaledConv(nnx.Module):
    """Convolution with scaled weight standardization and TensorFlow's "SAME" padding.

    The weights of each output channel are scaled to mean 0 and variance 1 / fan-in, then multiplied by a
    learned gain.
    """

    def __init__(
        self, width_in: int, width: int, size: int, *, stride: int = 1, groups: int = 1,
        epsilon: float = 1e-4, dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        check_widths(width_in, width)
        self.stride, self.groups, self.epsilon, self.dtype = stride, groups, epsilon, dtype
        shape = (size, size, width_in // groups, width)
        self.fan_in = math.prod(shape[:3])
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.gain = nnx.Param(jnp.ones((width, 1, 1, 1)))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Returns [B, ceil(H / stride), ceil(W / stride), width] in the compute dtype."""
        dtype = self.dtype or jnp.promote_types(x.dtype, jnp.float32)
        kernel = jnp.asarray(self.standardized(), dtype)
        y = jax.lax.conv_general_dilated(
            jnp.asarray(x, dtype), kernel, (self.stride, self.stride), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=self.groups,
        )  # fmt: skip
        return y + rearrange(self.bias[...], "c -> 1 1 1 c").astype(dtype)

    def standardized(self) -> Float[Array, "size size _ D"]:
        """The standardized weights, float32 [size, size, C / groups, width]."""
        kernel = self.kernel[...]
        mean = jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
        deviation = jnp.std(kernel, axis=(0, 1, 2), keepdims=True)
        gain = rearrange(self.gain[...], "c 1 1 1 -> 1 1 1 c") * self.fan_in**-0.5
        return gain * (kernel - mean) / (deviation + self.epsilon)
