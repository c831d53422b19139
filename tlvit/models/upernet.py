"""UperNet (Xiao et al. 2018, arXiv:1807.10221) over a vision transformer: semantic segmentation, as published
for LV-ViT (Jiang et al. 2021, arXiv:2104.10858)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from tlvit.models import deit, deit3, lvvit, t2t_vit
from tlvit.models.batch_norm import BatchNorm
from tlvit.models.layers import Conv, split_key
from tlvit.models.model import Model, check_indices
from tlvit.models.options import check_options
from tlvit.models.segmentation_heads import FCNHead, UPerHead
from tlvit.models.transformer import Block
from tlvit.models.vit import TokenModel
from tlvit.shapes import Float
from tlvit.types import Array, Dtype, SegmentationOutput

# As published: backbone, blocks whose outputs are used, channels of the heads. The published backbones differ
# from the classifiers in their LayerNorm epsilon (1e-5 there), in L's residual scale (3 there), and in the
# dropout in their MLPs, which takes the place of drop-path.
PUBLISHED: dict[str, Any] = {"epsilon": 1e-6, "mlp_dropout": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "upernet": {},
    "upernet_lvvit_s": {"backbone": "lvvit_s", "out_indices": (6, 9, 12, 15), **PUBLISHED},
    "upernet_lvvit_m": {"backbone": "lvvit_m", "out_indices": (10, 13, 16, 19), **PUBLISHED},
    "upernet_lvvit_l": {
        "backbone": "lvvit_l", "out_indices": (14, 17, 20, 23), "channels": 512, "skip_lam": 1.0,
        "image_size": 448, **PUBLISHED,
    },
}  # fmt: skip
BACKBONES = {
    name: functools.partial(model, **options)
    for model, variants in (
        (lvvit.LVViT, lvvit.VARIANTS),
        (deit.DeiT, deit.VARIANTS),
        (deit3.DeiT3, deit3.VARIANTS),
        (t2t_vit.T2TViT, t2t_vit.VARIANTS),
    )
    for name, options in variants.items()
}
SCALES = (4, 2, 1, 1)  # of the feature maps to the token grid: strides 4, 8, 16 and 16 with 16-pixel patches
LEVELS = {"upernet": (0, 1, 2, 3), "fcn": (2, 3)}  # feature maps that a head and the auxiliary head use


class UperNet(Model):
    """Semantic segmentation with the tokens of a vision transformer, for images of any size.

    `backbone` is the name of an LV-ViT, DeiT, DeiT III or T2T-ViT. `image_size` is the one that its position
    embeddings are for; they are resized to every other. The tokens after the blocks `out_indices` become four
    feature maps, the last one with `last_width` channels. `head` is "upernet" or "fcn", with `channels`
    channels. `auxiliary` adds an FCN head on the third map for training. `head_drop` is the dropout of
    the heads' channels.

    With `mlp_dropout` the rates of `drop_path` are used for dropout in the MLP of each block, and there is no
    drop-path, as in the published code of LV-ViT. By default `epsilon` (of the blocks' LayerNorms) and
    `skip_lam` are those of the backbone. All further options are options of the backbone.

    Attributes:
      grid: (h, w) of the position embeddings.
      backbone: the transformer without norm and classifiers, with the layers `side_layer1` to `side_layer4`,
        which make the feature maps.
      decode_head: UPerHead or FCNHead.
      auxiliary_head: FCNHead or None.
    """

    task = "segmentation"

    def __init__(
        self, *, num_classes: int = 150, image_size: int | tuple[int, int] = 512, backbone: str = "lvvit_s",
        out_indices: tuple[int, ...] | None = None, last_width: int = 2048, head: str = "upernet",
        channels: int = 256, auxiliary: bool = True, head_drop: float = 0.1, mlp_dropout: bool = False,
        epsilon: float | None = None, skip_lam: float | None = None, dtype: Dtype = None, rngs: nnx.Rngs,
        **options: Any,
    ):  # fmt: skip
        if head not in LEVELS:
            raise ValueError(f"head must be one of {', '.join(LEVELS)}, not {head!r}.")
        self.num_classes, self.levels = num_classes, LEVELS[head]
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(sorted(BACKBONES))}, not {backbone!r}.")
        build = BACKBONES[backbone]
        options = check_options(backbone, build, options)
        self.backbone = build(num_classes=1, image_size=image_size, dtype=dtype, rngs=rngs, **options)
        self.grid = self.backbone.grid
        widths = _token_widths(self.backbone)
        _remove_heads(self.backbone)
        _adjust_blocks(self.backbone.blocks, mlp_dropout=mlp_dropout, epsilon=epsilon, skip_lam=skip_lam)
        depth = len(widths)
        self.out_indices = tuple(out_indices or (max(depth * i // 4 - 1, 0) for i in (1, 2, 3, 4)))
        if len(self.out_indices) != len(SCALES):
            raise ValueError(f"out_indices must be {len(SCALES)} blocks, not {len(self.out_indices)}.")
        check_indices(self.out_indices, depth)
        widths = [widths[i] for i in self.out_indices]
        outputs = [*widths[:3], last_width]
        for level in self.levels:
            layer = side_layer(widths[level], outputs[level], SCALES[level], dtype=dtype, rngs=rngs)
            setattr(self.backbone, f"side_layer{level + 1}", layer)
        common: dict[str, Any] = {"drop_rate": head_drop, "dtype": dtype, "rngs": rngs}
        fcn = functools.partial(FCNHead, channels=channels, num_classes=num_classes, **common)
        self.decode_head = (
            UPerHead(outputs, channels, num_classes, **common)
            if head == "upernet"
            else fcn(last_width, level=-1, num_convs=2, concat_input=True)
        )
        self.auxiliary_head = (
            fcn(outputs[2], level=-2, num_convs=1, concat_input=False) if auxiliary else None
        )

    def __call__(
        self, images: Float[Array, "B H W 3"], *, key: jax.Array | None = None
    ) -> SegmentationOutput:
        """Runs the model.

        Args:
          images: normalized, of any size.
          key: PRNG key of the dropout and of drop-path. Nothing is dropped without one.

        Returns:
          SegmentationOutput, `aux` being None without an auxiliary head.
        """
        backbone_key, decode_key, auxiliary_key = split_key(key, 3)
        features = self.feature_maps(images, key=backbone_key)
        aux = self.auxiliary_head and self.auxiliary_head(features, auxiliary_key)
        return SegmentationOutput(logits=self.decode_head(features, decode_key), aux=aux)

    def feature_maps(
        self, images: Float[Array, "B H W 3"], *, key: jax.Array | None = None
    ) -> list[Float[Array, "B _ _ _"]]:
        """The feature maps that the heads see, the finest one first."""
        blocks = [self.out_indices[level] for level in self.levels]
        features = []
        for level, x in zip(
            self.levels, self.backbone.intermediates(images, blocks, key=key, any_size=True), strict=True
        ):
            for layer in getattr(self.backbone, f"side_layer{level + 1}"):
                x = layer(x)
            features.append(x)
        return features


class Upsample(nnx.Module):
    """Turns every cell into scale x scale cells: a transposed convolution whose size is its stride.

    The kernel is [scale, scale, out, in], so that its transpose has PyTorch's layout [in, out, ...].
    """

    def __init__(self, width: int, scale: int, *, dtype: Dtype = None, rngs: nnx.Rngs):
        self.dtype = dtype
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.kernel = nnx.Param(init(rngs.params(), (scale, scale, width, width)))

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B _ _ C"]:
        dtype = self.dtype or x.dtype
        y = jnp.einsum("bhwc,pqoc->bhpwqo", x.astype(dtype), self.kernel[...].astype(dtype))
        return rearrange(y, "b h p w q o -> b (h p) (w q) o")


def side_layer(
    width: int, width_out: int, scale: int, *, dtype: Dtype = None, rngs: nnx.Rngs
) -> Sequence[Any]:
    """The layers that make a feature map of the tokens."""
    finer = []
    if scale > 1:
        upsample = Upsample(width, scale, dtype=dtype, rngs=rngs)
        finer = [upsample, BatchNorm(width, dtype=dtype), jax.nn.relu]
    conv = Conv(width, width_out, 1, bias=False, dtype=dtype, rngs=rngs)
    return nnx.List([*finer, conv, BatchNorm(width_out, dtype=dtype), jax.nn.relu])


def _remove_heads(model: TokenModel) -> None:
    """Removes the norm after the last block and the classifiers."""
    model.norm = model.head = model.aux_head = model.head_dist = None


def _adjust_blocks(
    blocks: Sequence[nnx.Module], *, mlp_dropout: bool, epsilon: float | None, skip_lam: float | None
) -> None:
    """Sets what the published backbones have in another way than the classifiers."""
    for block in blocks:
        if isinstance(block, Block):  # the Transition of a dense T2T-ViT has none of this
            if mlp_dropout:
                block.mlp.drop_rate, block.drop_path = block.drop_path, 0.0
            if epsilon is not None:
                block.norm1.epsilon = block.norm2.epsilon = epsilon
            if skip_lam is not None:
                block.skip_lam = skip_lam


def _token_widths(model: TokenModel) -> list[int]:
    """Channels of the tokens after each block. Those of a dense T2T-ViT differ."""
    inputs = [
        block.norm1.num_features if isinstance(block, Block) else block.linear.in_features
        for block in model.blocks
    ]
    return [*inputs[1:], model.norm.num_features]
