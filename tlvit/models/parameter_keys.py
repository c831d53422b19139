"""The random keys that initialize a model's parameters."""

import jax
from flax import nnx


class ParameterKeys(nnx.Rngs):
    """Gives the keys of `nnx.Rngs(seed)`, and counts them in Python.

    nnx.Rngs counts in an array. While JAX traces a constructor, every change of this array makes JAX format
    an error message that it then discards, which takes longer with every parameter: 75 % of building lvvit_m.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.key = jax.random.key(seed)
        self.used = 0

    def params(self) -> jax.Array:
        """The next key."""
        self.used += 1
        return jax.random.fold_in(self.key, self.used - 1)
