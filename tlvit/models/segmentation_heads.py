"""The heads of semantic segmentation, UPerHead and FCNHead, with the names of mmsegmentation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tlvit.models.batch_norm import BatchNorm
from tlvit.models.layers import Conv
from tlvit.ops.dropout import dropout
from tlvit.ops.resize import resize_bilinear
from tlvit.shapes import Float
from tlvit.types import Array, Dtype

POOL_SIZES = (1, 2, 3, 6)  # of the pyramid pooling module


class ConvModule(nnx.Module):
    """Convolution without bias, BatchNorm and ReLU. The resolution stays the same."""

    def __init__(self, width_in: int, width_out: int, size: int, *, dtype: Dtype = None, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.conv = Conv(
            width_in, width_out, size, padding=size // 2, bias=False, kernel_init=init, dtype=dtype, rngs=rngs
        )
        self.bn = BatchNorm(width_out, dtype=dtype)

    def __call__(self, x: Float[Array, "B h w _"]) -> Float[Array, "B h w _"]:
        return jax.nn.relu(self.bn(self.conv(x)))


class SegmentationHead(nnx.Module):
    """Base of the heads: dropout of channels and the classifier of every cell."""

    def __init__(
        self, channels: int, num_classes: int, *, drop_rate: float = 0.1, dtype: Dtype = None, rngs: nnx.Rngs
    ):  # fmt: skip
        self.drop_rate = drop_rate
        init = nnx.initializers.normal(0.01)
        self.conv_seg = nnx.Conv(channels, num_classes, (1, 1), kernel_init=init, dtype=dtype, rngs=rngs)

    def classify(self, x: Float[Array, "B h w C"], key: jax.Array | None) -> Float[Array, "B h w L"]:
        """The float32 logits of every cell. `key` is the PRNG key of the dropout."""
        return self.conv_seg(drop_channels(x, self.drop_rate, key)).astype(jnp.float32)


class UPerHead(SegmentationHead):
    """The head of UperNet (Xiao et al. 2018, "Unified Perceptual Parsing", arXiv:1807.10221).

    The pyramid pooling module (Zhao et al. 2017, arXiv:1612.01105) adds context to the last feature map. A
    feature pyramid (Lin et al. 2017, arXiv:1612.03144) adds each map to the next finer one. All maps are
    resized to the finest one and fused.
    """

    def __init__(
        self, widths: Sequence[int], channels: int, num_classes: int, *, drop_rate: float = 0.1,
        dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(channels, num_classes, drop_rate=drop_rate, dtype=dtype, rngs=rngs)
        module = lambda width, size: ConvModule(width, channels, size, dtype=dtype, rngs=rngs)
        *finer, last = widths
        self.psp_modules = nnx.List([nnx.List([bins, module(last, 1)]) for bins in POOL_SIZES])
        self.bottleneck = module(last + len(POOL_SIZES) * channels, 3)
        self.lateral_convs = nnx.List([module(width, 1) for width in finer])
        self.fpn_convs = nnx.List([module(channels, 3) for _ in finer])
        self.fpn_bottleneck = module(len(widths) * channels, 3)

    def __call__(
        self, features: Sequence[Float[Array, "B _ _ _"]], key: jax.Array | None = None
    ) -> Float[Array, "B h w L"]:
        """The logits at the resolution of the first, finest feature map."""
        *finer, last = features
        pooled = [resize_like(conv(average_pool(last, bins)), last) for bins, conv in self.psp_modules]
        x = self.bottleneck(jnp.concatenate([last, *pooled], axis=-1))
        outputs = [x]
        for feature, lateral_conv, fpn_conv in reversed(
            list(zip(finer, self.lateral_convs, self.fpn_convs, strict=True))
        ):
            lateral = lateral_conv(feature)
            x = lateral + resize_like(x, lateral)
            outputs.insert(0, fpn_conv(x))
        fused = jnp.concatenate([resize_like(output, outputs[0]) for output in outputs], axis=-1)
        return self.classify(self.fpn_bottleneck(fused), key)


class FCNHead(SegmentationHead):
    """Convolutions and a classifier (Long et al. 2015, arXiv:1411.4038) for one of the feature maps.

    `level` is the index of that map, which has `width` channels. With `concat_input` a further convolution
    sees the map concatenated with the output of the others.
    """

    def __init__(
        self, width: int, channels: int, num_classes: int, *, level: int, num_convs: int, concat_input: bool,
        drop_rate: float = 0.1, dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(channels, num_classes, drop_rate=drop_rate, dtype=dtype, rngs=rngs)
        self.level = level
        module = lambda width: ConvModule(width, channels, 3, dtype=dtype, rngs=rngs)
        self.convs = nnx.List([module(channels if i else width) for i in range(num_convs)])
        self.conv_cat = module(width + channels) if concat_input else None

    def __call__(
        self, features: Sequence[Float[Array, "B _ _ _"]], key: jax.Array | None = None
    ) -> Float[Array, "B h w L"]:
        """The logits at the resolution of the feature map."""
        x = feature = features[self.level]
        for conv in self.convs:
            x = conv(x)
        if self.conv_cat is not None:
            x = self.conv_cat(jnp.concatenate([feature, x], axis=-1))
        return self.classify(x, key)


def average_pool(x: Float[Array, "B h w C"], bins: int) -> Float[Array, "B {bins} {bins} C"]:
    """Averages over bins x bins areas, as torch's `adaptive_avg_pool2d`.

    Bin i of n cells is [floor(i n / bins), ceil((i + 1) n / bins)), so bins may overlap.
    """
    rows, columns = _pool_matrix(x.shape[1], bins), _pool_matrix(x.shape[2], bins)
    pooled = jnp.einsum("iy,jx,byxc->bijc", rows, columns, x.astype(jnp.float32), precision="highest")
    return pooled.astype(x.dtype)


def _pool_matrix(size: int, bins: int) -> np.ndarray:
    """Weights [bins, size] of the average along one axis."""
    matrix = np.zeros((bins, size), np.float32)
    for i in range(bins):
        start, stop = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def resize_like(x: Float[Array, "B _ _ C"], other: Float[Array, "B h w _"]) -> Float[Array, "B h w C"]:
    """Resizes a feature map to the resolution of another one, bilinearly."""
    return resize_bilinear(x, other.shape[1:3])


def drop_channels(x: Float[Array, "B h w C"], rate: float, key: jax.Array | None) -> Float[Array, "B h w C"]:
    """Dropout of whole channels of an image. Nothing is dropped without a key."""
    return dropout(x, rate, key, axes=(0, 3))
