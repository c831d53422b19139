import jax
import numpy as np
from flax import nnx

from tlvit.models.parameter_keys import ParameterKeys


def test_the_keys_are_those_of_flax():
    keys, expected = ParameterKeys(7), nnx.Rngs(7)
    for _ in range(3):
        np.testing.assert_array_equal(
            jax.random.key_data(keys.params()), jax.random.key_data(expected.params())
        )
