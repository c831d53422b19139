"""What the tests of the model families share: filled models, official names of gradients, relative errors."""

import jax
import numpy as np
from conftest import fill
from flax import nnx

from tlvit import create_model
from tlvit.checkpoints.torch_names import from_torch, official_shapes
from tlvit.models.functional import functionalize
from tlvit.models.layers import Buffer
from tlvit.models.t2t_vit import sinusoid_table
from tlvit.types import ModelOutput

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def filled(name: str, **options) -> nnx.Module:
    """A model filled by the goldens' rule, never initialized; T2T-ViT's fixed position table stays itself."""
    model = nnx.eval_shape(lambda: create_model(name, **options))
    tensors = {}
    for key, shape in official_shapes(model).items():
        fixed = key == "pos_embed" and isinstance(model.pos_embed, Buffer)
        tensors[key] = sinusoid_table(*shape[1:]) if fixed else fill(key, shape)
    from_torch(model, tensors)
    return model


def run(model: nnx.Module, images, mix=None, key=None) -> ModelOutput:
    """The model's output in one compiled piece, which is faster than op by op; dropout if there is a key."""
    net, params, stats = functionalize(model)
    call = lambda p, s, x, mix, key: net.apply(p, s, x, mix=mix, train=key is not None, key=key)[0]
    return jax.jit(call)(params, stats, images, mix, key)


def official_names(tree, path=()):
    """Nested dict -> official name -> leaf, written apart from the conversion."""
    if not isinstance(tree, dict):
        return {".".join([*path[:-1], LEAVES.get(path[-1], path[-1])]): tree}
    return {
        name: leaf for key, sub in tree.items() for name, leaf in official_names(sub, (*path, key)).items()
    }


def relative(got, expected) -> float:
    """Largest difference, in units of the largest expected value."""
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def worst_norm(grads, names, norms) -> tuple[float, str]:
    """The largest relative error of a gradient's norm, and whose; every name must be there and no other."""
    ours = {k: float(np.linalg.norm(np.asarray(v).ravel())) for k, v in official_names(grads).items()}
    theirs = dict(zip(names.tolist(), norms.tolist(), strict=True))
    if ours.keys() != theirs.keys():
        raise AssertionError(f"Gradients of other tensors: {sorted(ours.keys() ^ theirs.keys())}")
    return max((abs(ours[k] - theirs[k]) / theirs[k], k) for k in ours)
