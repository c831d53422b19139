"""RegNetY (Radosavovic et al. 2020, "Designing Network Design Spaces", arXiv:2003.13678): annotators and the
teacher of DeiT."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tlvit.models.batch_norm import BatchNorm
from tlvit.models.convnet import PooledClassifier, PooledModel, SqueezeExcite
from tlvit.models.layers import Conv, drop_path, drop_path_rates, split_key
from tlvit.shapes import Float
from tlvit.types import Array, Dtype


def _size(widths: tuple[int, ...], depths: tuple[int, ...], group_width: int) -> dict:
    return {"widths": widths, "depths": depths, "group_width": group_width}


# Widths and depths of the four stages and the group width, as published. The number in a name is in 10^8
# MACs.
VARIANTS = {
    "regnety_002": _size((24, 56, 152, 368), (1, 1, 4, 7), 8),
    "regnety_004": _size((48, 104, 208, 440), (1, 3, 6, 6), 8),
    "regnety_006": _size((48, 112, 256, 608), (1, 3, 7, 4), 16),
    "regnety_008": _size((64, 128, 320, 768), (1, 3, 8, 2), 16),
    "regnety_016": _size((48, 120, 336, 888), (2, 6, 17, 2), 24),
    "regnety_032": _size((72, 216, 576, 1512), (2, 5, 13, 1), 24),
    "regnety_040": _size((128, 192, 512, 1088), (2, 6, 12, 2), 64),
    "regnety_064": _size((144, 288, 576, 1296), (2, 7, 14, 2), 72),
    "regnety_080": _size((168, 448, 896, 2016), (2, 4, 10, 1), 56),
    "regnety_120": _size((224, 448, 896, 2240), (2, 5, 11, 1), 112),
    "regnety_160": _size((224, 448, 1232, 3024), (2, 4, 11, 1), 112),
    "regnety_320": _size((232, 696, 1392, 3712), (2, 5, 12, 1), 232),
}


class RegNetY(PooledModel):
    """Stages of grouped bottlenecks with squeeze-and-excitation. The published models have four stages.

    The model takes images of any size. `image_size` is not used; all models have this option. The overall
    stride is stem_stride times the product of `strides`, 32 in the published models.
    """

    def __init__(
        self, *, num_classes: int = 1000, image_size: int | tuple[int, int] = 224, widths: tuple[int, ...],
        depths: tuple[int, ...], group_width: int, se_ratio: float = 0.25, stem_width: int = 32,
        stem_stride: int = 2, strides: tuple[int, ...] | None = None, drop_rate: float = 0.0,
        drop_path: float = 0.0, dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        strides = (2,) * len(widths) if strides is None else strides
        if not len(widths) == len(depths) == len(strides) > 0:
            raise ValueError(
                f"Every stage needs a width, a depth and a stride: widths={tuple(widths)}, "
                f"depths={tuple(depths)}, strides={tuple(strides)}."
            )
        self.num_classes, self.num_stages = num_classes, len(widths)
        self.stem = ConvNorm(3, stem_width, 3, stride=stem_stride, dtype=dtype, rngs=rngs)
        rates = drop_path_rates(drop_path, sum(depths))
        width_in = stem_width
        for i, (width, depth, stride) in enumerate(zip(widths, depths, strides, strict=True)):
            first = sum(depths[:i])
            stage = Stage(
                width_in, width, stride=stride, group_width=min(group_width, width), se_ratio=se_ratio,
                drop_path=rates[first : first + depth], dtype=dtype, rngs=rngs,
            )  # fmt: skip
            setattr(self, f"s{i + 1}", stage)
            width_in = width
        self.head = PooledClassifier(width_in, num_classes, drop_rate=drop_rate, dtype=dtype, rngs=rngs)

    def stage_outputs(
        self, images: Float[Array, "B H W 3"], key: jax.Array | None
    ) -> list[Float[Array, "B _ _ _"]]:
        """The feature maps after the stages. `key` is the PRNG key of drop-path."""
        x, outputs = jax.nn.relu(self.stem(images)), []
        for i, stage_key in enumerate(split_key(key, self.num_stages)):
            x = getattr(self, f"s{i + 1}")(x, stage_key)
            outputs.append(x)
        return outputs


class Stage(nnx.Module):
    """Bottlenecks b1, b2, … of one width. The first has the stride."""

    def __init__(
        self, width_in: int, width: int, *, stride: int, group_width: int, se_ratio: float,
        drop_path: Sequence[float], dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        if width % group_width:
            raise ValueError(
                f"Stage width {width} is not a multiple of the group width {group_width} (options widths and "
                "group_width)."
            )
        self.depth = len(drop_path)
        for i, rate in enumerate(drop_path):
            block = Bottleneck(
                width if i else width_in, width, stride=1 if i else stride, groups=width // group_width,
                se_ratio=se_ratio, drop_path=rate, dtype=dtype, rngs=rngs,
            )  # fmt: skip
            setattr(self, f"b{i + 1}", block)

    def __call__(self, x: Float[Array, "B H W C"], key: jax.Array | None = None) -> Float[Array, "B h w D"]:
        """Returns [B, ceil(H / stride), ceil(W / stride), width]."""
        for i, block_key in enumerate(split_key(key, self.depth)):
            x = getattr(self, f"b{i + 1}")(x, block_key)
        return x


class Bottleneck(nnx.Module):
    """Residual branch of 1x1, grouped 3x3, squeeze-and-excitation and 1x1. Its last norm starts with scale
    0."""

    def __init__(
        self, width_in: int, width: int, *, stride: int, groups: int, se_ratio: float, drop_path: float,
        dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.drop_path = drop_path
        self.conv1 = ConvNorm(width_in, width, 1, dtype=dtype, rngs=rngs)
        self.conv2 = ConvNorm(width, width, 3, stride=stride, groups=groups, dtype=dtype, rngs=rngs)
        # As published, the squeezed width is a fraction of the block's input width.
        squeezed = round(width_in * se_ratio)
        self.se = SqueezeExcite(width, squeezed, dtype=dtype, rngs=rngs) if squeezed else None
        self.conv3 = ConvNorm(width, width, 1, dtype=dtype, rngs=rngs)
        self.conv3.bn.scale[...] = jnp.zeros((width,))
        project = width_in != width or stride != 1
        self.downsample = (
            ConvNorm(width_in, width, 1, stride=stride, dtype=dtype, rngs=rngs) if project else None
        )

    def __call__(self, x: Float[Array, "B H W C"], key: jax.Array | None = None) -> Float[Array, "B h w D"]:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))
        x = self.conv3(x if self.se is None else self.se(x))
        return jax.nn.relu(drop_path(x, self.drop_path, key) + shortcut)


class ConvNorm(nnx.Module):
    """Convolution and BatchNorm. As published, the kernels have He initialization by fan-out."""

    def __init__(
        self, width_in: int, width: int, size: int, *, stride: int = 1, groups: int = 1, dtype: Dtype = None,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.conv = Conv(
            width_in, width, size, stride=stride, padding=size // 2, groups=groups, bias=False,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"), dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.bn = BatchNorm(width, dtype=dtype)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return self.bn(self.conv(x))
