"""Helpers of the model tests: filled and small models, official names of gradients, errors, comparisons."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from conftest import fill, images
from flax import nnx

from tlvit import create_model
from tlvit.checkpoints.torch_names import from_torch, official_shapes
from tlvit.models.functional import functionalize
from tlvit.models.layers import Buffer
from tlvit.models.t2t_vit import sinusoid_table
from tlvit.ops.losses import token_label_loss
from tlvit.ops.mixing import mixtoken_mask_from_box
from tlvit.types import ModelOutput, TokenTargets

TRANSFORMER = {"dim": 32, "depth": 2, "num_heads": 2, "image_size": 32, "num_classes": 7}
# Small models by the prefix of their names. The transformers have a 2x2 grid.
SMALL = {
    "lvvit": {**TRANSFORMER, "stem_width": 8},
    "vit": TRANSFORMER,
    "deit": TRANSFORMER,
    "t2t": TRANSFORMER,
    "regnety": {
        "num_classes": 10, "image_size": 48, "widths": (64, 128), "depths": (1, 1), "group_width": 64,
        "stem_width": 32, "strides": (2, 2), "stem_stride": 2,
    },
    "dm_nfnet": {
        "num_classes": 7, "widths": (16, 32), "depths": (1, 2), "stem_width": 16, "group_width": 8,
    },
}  # fmt: skip
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def small(name: str, **options) -> nnx.Module:
    """A small model of the family, filled by the goldens' rule."""
    return filled(name, **{**_small(name), **options})


def fresh(name: str, **options) -> nnx.Module:
    """A small model of the family, initialized."""
    return create_model(name, **{**_small(name), **options})


def filled(name: str, **options) -> nnx.Module:
    """A model filled by the goldens' rule. The fixed position table of T2T-ViT keeps its values."""
    model = nnx.eval_shape(lambda: create_model(name, **options))
    tensors = {}
    for key, shape in official_shapes(model).items():
        fixed = key == "pos_embed" and isinstance(model.pos_embed, Buffer)
        tensors[key] = sinusoid_table(*shape[1:]) if fixed else fill(key, shape)
    from_torch(model, tensors)
    return model


def run(model: nnx.Module, images, mix=None, key=None) -> ModelOutput:
    """The output of the compiled model, in training mode if there is a key."""
    net, params, stats = functionalize(model)
    call = lambda p, s, x, mix, key: net.apply(p, s, x, mix=mix, train=key is not None, key=key)[0]
    return jax.jit(call)(params, stats, images, mix, key)


def check_score_maps(model: nnx.Module, x: np.ndarray, case: Callable[[str], np.ndarray]) -> None:
    """Compares a convolutional network with a golden: features, logits, the best classes of every cell."""
    features = jax.jit(lambda x: model.features(x))(x)
    dense = model.head.dense(features).transpose(0, 3, 1, 2)
    index = case("dense_top5_index")
    for got, expected in (
        (features.mean((1, 2)), case("features_mean_per_channel")),
        (jnp.abs(features).mean(), case("features_absmean")),
        (model.head(features), case("eval_logits")),
        (jnp.take_along_axis(dense, index, 1), case("dense_top5_value")),
    ):
        assert relative(got, expected) < 1e-4
    np.testing.assert_array_equal(jax.lax.top_k(dense.swapaxes(1, 3), 5)[1].swapaxes(1, 3), index)


def token_label_gradients(model: nnx.Module) -> dict[str, float]:
    """Official name -> norm of the gradient of the token-label loss with MixToken, of a small model."""
    net, params, stats = functionalize(model)
    targets = TokenTargets(
        cls=jax.nn.one_hot(jnp.arange(4), 7),
        tokens=jax.nn.one_hot(jnp.arange(16).reshape(4, 4) % 7, 7),
        label=jax.nn.one_hot(jnp.arange(4), 7),
    )
    mix = mixtoken_mask_from_box((0, 0, 1, 2), (2, 2))

    def loss(params):
        output, _ = net.apply(params, stats, images(4), mix=mix, train=True, key=jax.random.key(0))
        return token_label_loss(output, targets, mix)

    grads = official_names(jax.jit(jax.grad(loss))(params))
    return {name: float(jnp.linalg.norm(gradient)) for name, gradient in grads.items()}


def official_names(tree, path=()):
    """Nested dict -> {official name: leaf}. It does not use tlvit's conversion, so it can check it."""
    if not isinstance(tree, dict):
        return {".".join([*path[:-1], LEAVES.get(path[-1], path[-1])]): tree}
    return {
        name: leaf for key, sub in tree.items() for name, leaf in official_names(sub, (*path, key)).items()
    }


def relative(got, expected) -> float:
    """The largest difference divided by the largest expected value."""
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def worst_norm(grads, names, norms) -> tuple[float, str]:
    """The largest relative error of a gradient's norm, and its name. Both must have the same names."""
    ours = {k: float(np.linalg.norm(np.asarray(v).ravel())) for k, v in official_names(grads).items()}
    theirs = dict(zip(names.tolist(), norms.tolist(), strict=True))
    if ours.keys() != theirs.keys():
        raise AssertionError(f"Gradients of other tensors: {sorted(ours.keys() ^ theirs.keys())}")
    return max((abs(ours[k] - theirs[k]) / theirs[k], k) for k in ours)


def _small(name: str) -> dict:
    return next(options for prefix, options in SMALL.items() if name.startswith(prefix))
