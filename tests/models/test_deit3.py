"""DeiT III: LayerScale, the class token without a position, published sizes and names of tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import images
from flax import nnx
from model_goldens import fresh, relative, small

import tlvit
from tlvit.checkpoints.torch_names import identify, official_shapes
from tlvit.models import functional
from tlvit.models.relevance import class_logits

NAME = "deit_small_patch16_LS"


@pytest.mark.parametrize(
    ("name", "size", "count"), [(NAME, 224, 22_059_496), ("deit_base_patch16_LS", 384, 86_877_160)]
)
def test_parameter_counts(name, size, count):
    """DeiT's, with two factors for each channel and block, and without a position of the class token."""
    model = nnx.eval_shape(lambda: tlvit.create_model(name, image_size=size))
    _, params, _ = functional.functionalize(model)
    assert functional.count_parameters(params) == count
    width, tokens = model.head.kernel.shape[0], model.grid[0] * model.grid[1]
    shapes = official_shapes(model)
    assert shapes["pos_embed"] == (1, tokens, width)
    assert shapes["blocks.11.gamma_1"] == shapes["blocks.11.gamma_2"] == (width,)
    found = identify({key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()})
    assert (found.model, found.image_size) == (name, (size, size))


def test_logits_equal_pytorch():
    """Written from the paper with torch.nn; all parameters, LayerScale as well, have random values."""
    torch = pytest.importorskip("torch")
    from torch_models.deit import DeiT3

    module = DeiT3(width=32, depth=2, heads=2, grid=(2, 2), classes=7).eval()
    state = {k: 0.3 * torch.randn(v.shape, generator=torch.Generator().manual_seed(i))
             for i, (k, v) in enumerate(module.state_dict().items())}  # fmt: skip
    module.load_state_dict(state)
    model = fresh(NAME)
    report = tlvit.from_torch(model, state)
    assert report.reinitialized == report.unexpected == ()
    batch = images(3, 32)
    with torch.no_grad():
        expected = module(torch.tensor(np.asarray(batch)).permute(0, 3, 1, 2)).numpy()
    assert relative(model(batch).logits, expected) < 1e-5
    assert tlvit.to_torch(model).keys() == state.keys()


def test_layer_scale_starts_small():
    model = fresh(NAME, layer_scale=0.25)
    assert {float(x) for x in np.asarray(model.blocks[1].gamma_2[...])} == {0.25}
    assert fresh(NAME).blocks[0].gamma_1[...][0] == np.float32(1e-4)
    x = np.ones((1, 5, 32), np.float32)
    assert np.abs(np.asarray(fresh(NAME).blocks[0](x)) - x).max() < 1e-4  # nearly the identity


def test_all_blocks_have_the_same_drop_path():
    assert [block.drop_path for block in fresh(NAME, depth=3, drop_path=0.2).blocks] == [0.2] * 3


def test_the_class_token_has_no_position():
    model = small(NAME)
    sequence = model.embed(images(2, 32))
    np.testing.assert_array_equal(sequence[:, 0], np.broadcast_to(model.cls_token[...][:, 0], (2, 32)))
    larger = model.intermediates(images(2, 64), [1], any_size=True)[0]
    assert larger.shape == (2, 4, 4, 32)
    other = fresh(NAME, image_size=64)
    report = tlvit.from_torch(other, tlvit.to_torch(model), allow="pos_embed")
    assert report.resized == ("pos_embed",)
    np.testing.assert_allclose(other.intermediates(images(2, 64), [1])[0], larger, atol=1e-5)


def test_given_attention_weights():
    """The computation for relevance maps is that of the model."""
    model = small(NAME)
    batch = images(2, 32)
    zeros = [np.zeros_like(attention) for attention in model.attention_maps(batch)]
    np.testing.assert_allclose(class_logits(model, batch, zeros), model(batch).logits, rtol=1e-4, atol=1e-5)


def test_blocks_as_a_loop():
    batch, key = images(2, 32), jax.random.key(0)
    plain, scanned = (small(NAME, drop_path=0.5, scan_blocks=scan) for scan in (False, True))
    expected = plain(batch, key=key).cls
    np.testing.assert_allclose(scanned(batch, key=key).cls, expected, rtol=1e-5, atol=1e-6)
    assert relative(plain(batch).cls, expected) > 1e-3  # something was dropped


def test_token_head():
    output = small(NAME, token_head=True)(images(2, 32))
    assert output.tokens.shape == (2, 4, 7)


def test_logits_are_float32_in_bfloat16():
    """The heads sum in float32, as in the other families."""
    output = fresh(NAME, token_head=True, dtype=jnp.bfloat16)(images(2, 32))
    assert output.cls.dtype == output.tokens.dtype == jnp.float32
