"""What LV-ViT, T2T-ViT and DeiT do alike: from patches to a sequence, through the blocks, to logits."""

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from flax import nnx

from tlvit.models.layers import Block, dropout, run_blocks, split_key
from tlvit.models.model import Model
from tlvit.ops.mixing import mix_tokens
from tlvit.types import Array, MixTokenMask, ModelOutput

RULES = ("max", "mean", "class")


class TokenModel(Model):
    """A vision transformer whose patch tokens can be classified, too.

    A subclass sets grid, rule, token_weight, drop_rate and remat, the modules and parameters that are named
    below, and in `embed_patches` how an image becomes patches. `aux_head`, the token head, may be None; so
    may `dist_token` and `head_dist`, which only a distilled model has.
    """

    dist_token = head_dist = None

    @property
    def has_token_head(self) -> bool:
        """Whether the patch tokens are classified."""
        return self.aux_head is not None

    @property
    def has_distillation_token(self) -> bool:
        """Whether there is a distillation token with a head of its own."""
        return self.dist_token is not None

    @property
    def has_dense_logits(self) -> bool:
        """Whether `dense_logits` works: it needs the token head."""
        return self.has_token_head

    def embed_patches(self, images: Array, key: Array | None = None) -> Array:
        """[B, H, W, 3] -> [B, h, w, D]."""
        raise NotImplementedError

    def __call__(
        self, images: Array, *, mix: MixTokenMask | None = None, key: Array | None = None
    ) -> ModelOutput:
        """Normalized float32 [B, H, W, 3] -> ModelOutput; `mix` mixes tokens and un-mixes their logits."""
        keys = split_key(key, 2)
        x = self.embed_patches(images, keys[0])
        if mix is not None:
            x = mix_tokens(x, mix)
        x = self._encode(x, keys[1])
        return classify(
            self.head(x[:, 0]), x[:, self._num_prefix :], self.aux_head, grid=self.grid, mix=mix,
            rule=self.rule, token_weight=self.token_weight,
            dist=None if self.head_dist is None else self.head_dist(x[:, 1]),
        )  # fmt: skip

    def features(self, images: Array) -> Array:
        """The normalized patch tokens, [B, h, w, D]."""
        x = self._encode(self.embed_patches(images), None)[:, self._num_prefix :]
        return x.reshape(x.shape[0], *self.grid, -1)

    def dense_logits(self, images: Array) -> Array:
        """The token head's logits, float32 [B, h, w, L]: a model that has one can annotate too.

        Raises:
          ValueError: it has none.
        """
        if self.aux_head is None:
            raise ValueError(
                "This model has no token head, so no logits per token; build it with token_head=True."
            )
        return self.aux_head(self.features(images)).astype(jnp.float32)

    def attention_maps(self, images: Array) -> list[Array]:
        """The attention of every block, float32 [B, heads, P + N, P + N] each; the first P tokens are the
        class token and, in a distilled model, the distillation token."""
        return attention_maps(self.blocks, self._embed(self.embed_patches(images)))

    @property
    def _num_prefix(self) -> int:
        return 1 if self.dist_token is None else 2

    def _embed(self, x: Array) -> Array:
        """[B, h, w, D] -> [B, P + N, D]."""
        prefix = [token[...] for token in (self.cls_token, self.dist_token) if token is not None]
        return embed_tokens(x, prefix, self.pos_embed[...], grid=self.grid)

    def _encode(self, x: Array, key: Array | None) -> Array:
        """[B, h, w, D] -> [B, P + N, D], normalized."""
        keys = split_key(key, 2)
        x = dropout(self._embed(x), self.drop_rate, keys[0])
        return self.norm(run_blocks(self.blocks, x, keys[1], remat=self.remat))


def embed_tokens(x: Array, prefix: Sequence[Array], pos_embed: Array, *, grid: tuple[int, int]) -> Array:
    """Patch tokens become a sequence with the class (and distillation) token in front and positions added.

    Args:
      x: [B, h, w, D].
      prefix: P tokens [1, 1, D].
      pos_embed: [1, P + N, D].
      grid: (h, w) that the model is built for.

    Returns:
      [B, P + N, D].

    Raises:
      ValueError: the images gave another grid.
    """
    batch, h, w, dim = x.shape
    if (h, w) != tuple(grid):
        raise ValueError(f"This model is built for {grid[0]}x{grid[1]} tokens, the images give {h}x{w}.")
    front = [jnp.broadcast_to(token.astype(x.dtype), (batch, 1, dim)) for token in prefix]
    return jnp.concatenate([*front, x.reshape(batch, h * w, dim)], axis=1) + pos_embed.astype(x.dtype)


def classify(
    cls: Array, patches: Array, aux_head: nnx.Module | None, *, grid: tuple[int, int],
    mix: MixTokenMask | None, rule: str, token_weight: float, dist: Array | None = None,
) -> ModelOutput:  # fmt: skip
    """The output of every transformer here: class logits, token logits if there is a head for them, and the
    inference logits by `rule` (see `infer`).

    Args:
      cls, dist: logits [B, L] of the class and the distillation token; inference starts from their mean.
      patches: encoded patch tokens [B, N, D].
      aux_head: the token head, or None.
      grid: (h, w) of the tokens.
      mix: the mask the tokens were mixed with: their logits are un-mixed, each back to its own image.
    """
    cls = cls.astype(jnp.float32)
    dist = None if dist is None else dist.astype(jnp.float32)
    whole = cls if dist is None else (cls + dist) / 2
    if aux_head is None:
        return ModelOutput(logits=whole, cls=cls, dist=dist)
    tokens = aux_head(patches).astype(jnp.float32)
    if mix is not None:
        batch, count, classes = tokens.shape
        tokens = mix_tokens(tokens.reshape(batch, *grid, classes), mix).reshape(batch, count, classes)
    logits = infer(whole, tokens, rule=rule, token_weight=token_weight)
    return ModelOutput(logits=logits, cls=cls, tokens=tokens, dist=dist)


def infer(cls: Array, tokens: Array, *, rule: str, token_weight: float) -> Array:
    """Inference logits [B, L] from those of the class token [B, L] and of the tokens [B, N, L]: "max"
    (published) is cls + token_weight * max over tokens, "mean" takes the mean instead, "class" cls alone."""
    if rule == "class":
        return cls
    return cls + token_weight * (jnp.max(tokens, axis=1) if rule == "max" else jnp.mean(tokens, axis=1))


def check_rule(rule: str) -> str:
    """The rule itself.

    Raises:
      ValueError: it is none of RULES.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}.")
    return rule


def attention_maps(blocks: Iterable[nnx.Module], x: Array) -> list[Array]:
    """The attention of every block for embedded tokens [B, N, D], float32 [B, heads, N, N] each."""
    maps = []
    for block in blocks:
        if isinstance(block, Block):  # the Transition of a dense T2T-ViT has no attention
            maps.append(block.attn.weights(block.norm1(x)))
        x = block(x)
    return maps
