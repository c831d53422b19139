"""The forward pass of LV-ViT, T2T-ViT and both DeiTs: stem, prefix tokens, blocks, heads, inference rule."""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.sharding import PartitionSpec

from tlvit.models.layers import model_axis, run_blocks, run_part, split_key
from tlvit.models.model import Model, check_images, check_indices
from tlvit.models.transformer import Block
from tlvit.ops.dropout import dropout
from tlvit.ops.mixing import mix_tokens
from tlvit.ops.resize import resize_pos_embed
from tlvit.shapes import Float
from tlvit.types import Array, MixTokenMask, ModelOutput

RULES = ("max", "mean", "class")


class TokenModel(Model):
    """A vision transformer. A subclass sets the attributes and defines `embed_patches`, its stem.

    Attributes:
      grid: (h, w) of the patch tokens, N = h * w.
      cls_token: [1, 1, D], learned.
      dist_token: [1, 1, D], learned, or None if the model has no distillation token.
      pos_embed: [1, P + N, D], where P is 2 with a distillation token and 1 without; [1, N, D] without
        `prefix_positions`.
      prefix_positions: whether the prefix tokens have positions.
      blocks: transformer blocks, [B, P + N, D] -> [B, P + N, D].
      norm: LayerNorm after the last block.
      head, head_dist: classifiers of the class token and of the distillation token (or None).
      aux_head: the token head, which classifies every patch token, or None.
      rule, token_weight: how inference combines the heads, see `infer`.
      drop_rate: dropout after the positions are added, in [0, 1).
      remat: whether the backward pass computes every block's activations again, to save memory.
      scan_blocks: whether equal blocks run as one loop: less to compile, less memory.
    """

    grid: tuple[int, int]  # pyrefly: ignore[bad-override-mutable-attribute]  (never None in this class)
    dist_token = head_dist = None
    prefix_positions = True
    scan_blocks = False

    def embed_patches(
        self, images: Float[Array, "B H W 3"], key: jax.Array | None = None
    ) -> Float[Array, "B h w D"]:
        """The stem: images to patch tokens. `key` is the PRNG key of its dropout."""
        raise NotImplementedError

    def __call__(
        self,
        images: Float[Array, "B H W 3"],
        *,
        mix: MixTokenMask | None = None,
        key: jax.Array | None = None,
    ) -> ModelOutput:
        """Runs the model.

        Args:
          images: normalized.
          mix: MixToken mask. Mixes the patch tokens of the batch after the stem. The token logits are mixed
            with it a second time, which puts each of them back to the image that the patch is from.
          key: PRNG key of dropout and drop-path. Nothing is dropped without one.

        Returns:
          ModelOutput with `tokens` if the model has a token head and `dist` if it has a distillation token.

        Raises:
          ValueError: the images are not normalized floats, or the images or the mask do not fit `grid`.
        """
        stem_key, encoder_key = split_key(key, 2)
        drop_key, blocks_key = split_key(encoder_key, 2)
        x = self._patches(images, stem_key)  # [B, h, w, D]
        if mix is not None:
            x = mix_tokens(x, mix)
        x = dropout(self._sequence(x), self.drop_rate, drop_key)  # [B, P + N, D]
        x = self.norm(run_blocks(self.blocks, x, blocks_key, remat=self.remat, scan=self.scan_blocks))

        cls = self.head(x[:, 0])
        dist = None if self.head_dist is None else self.head_dist(x[:, 1])
        logits = cls if dist is None else (cls + dist) / 2
        if self.aux_head is None:
            return ModelOutput(logits=logits, cls=cls, dist=dist)
        tokens = self.aux_head(x[:, self._num_prefix :])
        if mix is not None:
            tokens = rearrange(mix_tokens(self._on_grid(tokens), mix), "b h w l -> b (h w) l")
        logits = infer(logits, tokens, rule=self.rule, token_weight=self.token_weight)
        return ModelOutput(logits=logits, cls=cls, tokens=tokens, dist=dist)

    def features(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        """The patch tokens after the last block, normalized."""
        return self._on_grid(self._encode(images)[:, self._num_prefix :])

    def pooled_features(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """The class token after the last block, normalized; with a distillation token, the mean of both."""
        return jnp.mean(self._encode(images)[:, : self._num_prefix], axis=1)

    def dense_logits(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w L"]:
        """The logits of every patch, in float32: those of the token head.

        A model without a token head applies the classifier of its class token to the patch tokens; with a
        distillation token, the mean of both classifiers. The patch tokens were not trained for that, so such
        logits are weaker.
        """
        x = self.features(images)
        if self.aux_head is not None:
            return self.aux_head(x)
        logits = self.head(x)
        return logits if self.head_dist is None else (logits + self.head_dist(x)) / 2

    def embed(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
        """The input of the first block: prefix tokens and patch tokens, with positions."""
        return self._sequence(self._patches(images))

    def attention_maps(self, images: Float[Array, "B H W 3"]) -> list[Float[Array, "B heads T T"]]:
        """The attention of every block, float32, for T = P + N tokens.

        The first P tokens are the class token and, in a distilled model, the distillation token.
        """
        return attention_maps(self.blocks, self._sequence(self._patches(images)))

    def intermediates(
        self,
        images: Float[Array, "B H W 3"],
        blocks: Sequence[int],
        *,
        key: jax.Array | None = None,
        any_size: bool = False,
    ) -> list[Float[Array, "B h w _"]]:
        """The patch tokens after some of the blocks, not normalized.

        Args:
          images: normalized.
          blocks: indices into `self.blocks`, in [0, len(self.blocks)).
          key: PRNG key of dropout and drop-path. Nothing is dropped without one.
          any_size: resizes the position embeddings to the grid of the images (bicubic).

        Returns:
          One array for each index, in the order of `blocks`.

        Raises:
          ValueError: an index is out of range, or the images do not fit `grid` and not `any_size`.
        """
        check_indices(blocks, len(self.blocks))
        stem_key, encoder_key = split_key(key, 2)
        drop_key, blocks_key = split_key(encoder_key, 2)
        x = self._patches(images, stem_key)
        grid = x.shape[1:3]
        x = dropout(self._sequence(x, any_size), self.drop_rate, drop_key)
        keys, outputs, done = split_key(blocks_key, len(self.blocks)), {}, 0
        for last in sorted(set(blocks)):
            part = slice(done, last + 1)
            x = run_part(self.blocks[part], x, keys[part], remat=self.remat, scan=self.scan_blocks)
            outputs[last], done = x, last + 1
        patches = [outputs[i][:, self._num_prefix :] for i in blocks]
        return [rearrange(x, "b (h w) d -> b h w d", h=grid[0]) for x in patches]

    @property
    def has_token_head(self) -> bool:
        """Whether the patch tokens are classified."""
        return self.aux_head is not None

    @property
    def has_distillation_token(self) -> bool:
        """Whether the model has a distillation token with its own head."""
        return self.dist_token is not None

    @property
    def has_dense_logits(self) -> bool:
        """Whether `dense_logits` works. Without a token head its logits are weaker."""
        return True

    @property
    def _num_prefix(self) -> int:
        """P, the number of prefix tokens."""
        return 1 if self.dist_token is None else 2

    def _patches(self, images: Array, key: jax.Array | None = None) -> Array:
        """The stem, for images that are checked."""
        check_images(images)
        mesh = jax.sharding.get_abstract_mesh()
        if model_axis() == 1 or images.shape[0] % mesh.size:
            return self.embed_patches(images, key)
        # Tensor parallelism: devices that divide the heads of the blocks divide the images of the stem.
        spread = lambda x, axes: jax.lax.with_sharding_constraint(x, PartitionSpec(axes, None, None, None))
        x = spread(self.embed_patches(spread(images, mesh.axis_names), key), mesh.axis_names)
        return spread(x, tuple(axis for axis in mesh.axis_names if axis != "model"))

    def _sequence(self, x: Array, any_size: bool = False) -> Array:
        """[B, h, w, D] -> [B, P + N, D], with positions, which are resized if `any_size`."""
        prefix = [token[...] for token in (self.cls_token, self.dist_token) if token is not None]
        pos_embed, grid = self.pos_embed[...], self.grid
        if any_size:
            grid = (x.shape[1], x.shape[2])
            if 0 in grid:
                raise ValueError("The images are smaller than one patch.")
            positions = len(prefix) if self.prefix_positions else 0
            pos_embed = resize_pos_embed(pos_embed, grid, num_prefix=positions, old_grid=self.grid)
        if not self.prefix_positions:
            pos_embed = jnp.pad(pos_embed, ((0, 0), (len(prefix), 0), (0, 0)))
        return embed_tokens(x, prefix, pos_embed, grid=grid)

    def _encode(self, images: Array) -> Array:
        """[B, H, W, 3] -> [B, P + N, D], the tokens after the last block, normalized."""
        x = self._sequence(self._patches(images))
        return self.norm(run_blocks(self.blocks, x, None, remat=self.remat, scan=self.scan_blocks))

    def _on_grid(self, x: Array) -> Array:
        """[B, N, D] -> [B, h, w, D]."""
        return rearrange(x, "b (h w) d -> b h w d", h=self.grid[0])


def embed_tokens(
    x: Float[Array, "B h w D"],
    prefix: Sequence[Float[Array, "1 1 D"]],
    pos_embed: Float[Array, "1 T D"],
    *,
    grid: tuple[int, int],
) -> Float[Array, "B T D"]:
    """Puts the prefix tokens in front of the patch tokens and adds the positions.

    Args:
      x: patch tokens.
      prefix: the P prefix tokens.
      pos_embed: positions of all T = P + h * w tokens.
      grid: (h, w) that the model is built for.

    Raises:
      ValueError: the patch tokens have another grid.
    """
    batch, h, w, _ = x.shape
    if (h, w) != tuple(grid):
        raise ValueError(f"This model is built for {grid[0]}x{grid[1]} tokens, the images give {h}x{w}.")
    front = [repeat(token.astype(x.dtype), "1 1 d -> b 1 d", b=batch) for token in prefix]
    tokens = jnp.concatenate([*front, rearrange(x, "b h w d -> b (h w) d")], axis=1)
    return tokens + pos_embed.astype(x.dtype)


def infer(
    cls: Float[Array, "B L"], tokens: Float[Array, "B N L"], *, rule: str, token_weight: float
) -> Float[Array, "B L"]:
    """Inference logits from those of the class token and those of the patch tokens.

    Args:
      cls: logits of the class token; with a distillation token the mean of both.
      tokens: logits of the patch tokens.
      rule: "max" adds token_weight * (maximum over the tokens), as published for LV-ViT. "mean" adds
        token_weight * (mean over the tokens). "class" returns `cls`.
      token_weight: 0.5 in LV-ViT.
    """
    if rule == "class":
        return cls
    return cls + token_weight * (jnp.max(tokens, axis=1) if rule == "max" else jnp.mean(tokens, axis=1))


def check_rule(rule: str) -> str:
    """Returns the inference rule.

    Raises:
      ValueError: it is not one of RULES.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}.")
    return rule


def attention_maps(
    blocks: Iterable[Callable[[Array], Array]], x: Float[Array, "B T D"]
) -> list[Float[Array, "B heads T T"]]:
    """The attention of every block, float32, for embedded tokens `x`."""
    maps = []
    for block in blocks:
        if isinstance(block, Block):  # the Transition of a dense T2T-ViT has no attention
            maps.append(block.attn.weights(block.norm1(x)))
        x = block(x)
    return maps
