"""The parts of the convolutional networks against NumPy, and the feature maps after their stages."""

import jax
import model_goldens
import numpy as np
import pytest
from conftest import images, randn
from flax import nnx

from tlvit.models import convnet


def test_squeeze_and_excitation_equals_numpy():
    layer = convnet.SqueezeExcite(6, 2, rngs=nnx.Rngs(0))
    squeeze, excite = (np.asarray(fc.kernel[...])[0, 0] for fc in (layer.fc1, layer.fc2))
    bias1, bias2 = (np.asarray(fc.bias[...]) for fc in (layer.fc1, layer.fc2))
    x = randn(2, 4, 5, 6)
    hidden = np.maximum(x.mean((1, 2)) @ squeeze + bias1, 0)
    expected = x / (1 + np.exp(-(hidden @ excite + bias2)))[:, None, None]
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_the_classifier_of_the_average_is_the_average_of_the_dense_logits():
    head = convnet.PooledClassifier(6, 3, rngs=nnx.Rngs(0))
    x = randn(2, 4, 5, 6)
    expected = x.mean((1, 2)) @ np.asarray(head.fc.kernel[...]) + np.asarray(head.fc.bias[...])
    np.testing.assert_allclose(head(x), expected, atol=1e-6)
    np.testing.assert_allclose(head.dense(x).mean((1, 2)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("regnety_002", [(2, 16, 12, 64), (2, 8, 6, 128)]),
        pytest.param("dm_nfnet_f0", [(2, 16, 12, 16), (2, 8, 6, 32)], marks=pytest.mark.slow),
    ],
)
def test_intermediates_are_the_outputs_of_the_stages(name, shapes):
    model, x = model_goldens.small(name), images(2, 64, 48)
    first, last = jax.jit(lambda x: model.intermediates(x, [0, 1]))(x)
    assert [first.shape, last.shape] == shapes
    features = jax.jit(lambda x: model.features(x))(x)
    np.testing.assert_allclose(jax.jit(model.final_map)(last), features, atol=1e-4)
    (again,) = jax.jit(lambda x: model.intermediates(x, [1]))(x)
    np.testing.assert_allclose(again, last, atol=1e-5)
    with pytest.raises(ValueError, match=r"Indices must be in 0\.\.1, not 2, -1"):
        model.intermediates(x, [0, 2, -1])
