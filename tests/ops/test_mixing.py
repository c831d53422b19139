"""MixToken, mixup and CutMix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randn
from jax.sharding import NamedSharding, PartitionSpec

from tlvit.ops import mixing
from tlvit.types import MixTokenMask

BETWEEN_DEVICES = ("all-to-all", "collective-permute", "all-gather", "all-reduce", "reduce-scatter")


def test_mask_and_lam_of_a_box_equal_numpy():
    mix = mixing.mixtoken_mask_from_box((1, 2, 4, 7), (6, 8))
    expected = np.zeros((1, 6, 8), bool)
    expected[0, 1:4, 2:7] = True
    np.testing.assert_array_equal(mix.mask, expected)
    np.testing.assert_allclose(mix.lam, [1 - 15 / 48], atol=1e-7)
    empty = mixing.mixtoken_mask_from_box((3, 3, 3, 3), (6, 8))
    assert not empty.mask.any()
    np.testing.assert_array_equal(empty.lam, [1.0])


@pytest.mark.parametrize("box", [(-1, 0, 2, 2), (0, 0, 7, 2), (0, 3, 2, 2), (0, 0, 2, 9)])
def test_a_box_outside_of_the_grid_raises(box):
    with pytest.raises(ValueError, match="6x8"):
        mixing.mixtoken_mask_from_box(box, (6, 8))


def test_the_partner_is_the_image_at_the_mirrored_index():
    tokens = randn(4, 6, 8, 3)
    mixed = mixing.mix_tokens(tokens, mixing.mixtoken_mask_from_box((1, 2, 4, 7), (6, 8)))
    expected = tokens.copy()
    expected[:, 1:4, 2:7] = tokens[::-1, 1:4, 2:7]
    np.testing.assert_array_equal(mixed, expected)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("trailing", [(), (5,), (2, 3)])
def test_shards_are_mixed_independently_and_mixing_twice_is_the_identity(shards, trailing):
    mix = mixing.draw_mixtoken_mask(jax.random.key(3), (5, 7), shards)
    tokens = randn(8, 5, 7, *trailing, seed=1)
    mixed = mixing.mix_tokens(tokens, mix)
    for s in range(shards):
        part = slice(s * 8 // shards, (s + 1) * 8 // shards)
        own = tokens[part]
        mask = np.asarray(mix.mask[s]).reshape(1, 5, 7, *(1,) * len(trailing))
        np.testing.assert_array_equal(mixed[part], np.where(mask, own[::-1], own))
    assert np.any(np.asarray(mixed) != tokens)
    np.testing.assert_array_equal(mixing.mix_tokens(mixed, mix), tokens)


def test_class_targets_are_mixed_by_area():
    mask = np.zeros((2, 4, 4), bool)
    mix = MixTokenMask(mask=mask, lam=np.array([0.75, 0.5], np.float32))
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    own, partner = values, values[[1, 0, 3, 2]]
    expected = np.concatenate([0.75 * own[:2] + 0.25 * partner[:2], 0.5 * own[2:] + 0.5 * partner[2:]])
    np.testing.assert_allclose(mixing.mix_by_area(values, mix), expected, atol=1e-6)


def test_masks_of_another_shape_raise_with_the_numbers():
    mix = mixing.draw_mixtoken_mask(jax.random.key(0), (4, 4), 3)
    with pytest.raises(ValueError, match=r"8 images.*3"):
        mixing.mix_tokens(jnp.zeros((8, 4, 4, 1)), mix)
    with pytest.raises(ValueError, match=r"4x4.*4x5"):
        mixing.mix_tokens(jnp.zeros((9, 4, 5, 1)), mix)


def published_boxes(count, h, w, seed):
    """Area fractions of CutMix's boxes, drawn by numpy: integer half sides, cut at the border."""
    rng = np.random.RandomState(seed)
    side = np.sqrt(1 - rng.beta(1, 1, count))
    half_h, half_w = (h * side).astype(int) // 2, (w * side).astype(int) // 2
    y, x = rng.randint(h, size=count), rng.randint(w, size=count)
    tall = np.clip(y + half_h, 0, h) - np.clip(y - half_h, 0, h)
    wide = np.clip(x + half_w, 0, w) - np.clip(x - half_w, 0, w)
    return tall * wide / (h * w)


def test_drawn_boxes_are_boxes_with_the_published_distribution():
    h, w, count = 14, 10, 20000
    mix = mixing.draw_mixtoken_mask(jax.random.key(0), (h, w), count)
    mask = np.asarray(mix.mask)
    rows, columns = mask.any(2), mask.any(1)
    np.testing.assert_array_equal(mask, rows[:, :, None] & columns[:, None, :])  # a rectangle
    for line in (rows, columns):  # in one piece
        edges = np.diff(np.pad(line, ((0, 0), (1, 1))).astype(int), axis=1)
        assert ((edges == 1).sum(1) <= 1).all()
    np.testing.assert_allclose(mix.lam, 1 - mask.mean((1, 2)), atol=1e-6)
    fraction, expected = 1 - np.asarray(mix.lam), published_boxes(200000, h, w, 0)
    # 0.013: four standard errors of the largest difference of two distribution functions.
    levels = (np.arange(0, h * w, 4) + 0.5) / (h * w)  # between two numbers of tokens
    difference = np.mean(fraction[:, None] <= levels, 0) - np.mean(expected[:, None] <= levels, 0)
    assert np.abs(difference).max() < 0.013
    assert abs(fraction.mean() - expected.mean()) < 4 * fraction.std() / np.sqrt(count)
    # A box covers rows y - half to y + half - 1 of a uniform y: the mirror of row r is row h - 2 - r.
    often = mask.mean((0, 2))[:-1]
    np.testing.assert_allclose(often, often[::-1], atol=0.015)


def test_every_shard_draws_a_box():
    mix = mixing.draw_mixtoken_mask(jax.random.key(1), (14, 14), 8)
    assert len({m.tobytes() for m in np.asarray(mix.mask)}) >= 6
    again = mixing.draw_mixtoken_mask(jax.random.key(1), (14, 14), 8)
    np.testing.assert_array_equal(mix.mask, again.mask)


def test_mixing_a_sharded_batch_needs_no_other_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    replicated = NamedSharding(mesh, PartitionSpec())

    def mix_and_back(key, tokens, targets):
        mix = mixing.draw_mixtoken_mask(key, (4, 4), 8)
        return mixing.mix_tokens(tokens, mix), mixing.mix_by_area(targets, mix)

    tokens = randn(16, 4, 4, 6)
    targets = np.random.RandomState(1).rand(16, 5).astype(np.float32)
    run = jax.jit(mix_and_back, in_shardings=(replicated, split, split), out_shardings=(split, split))
    key = jax.random.key(0)
    text = run.lower(key, tokens, targets).compile().as_text()
    assert [kind for kind in BETWEEN_DEVICES if kind in text] == []
    for got, expected in zip(run(key, tokens, targets), mix_and_back(key, tokens, targets), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    # The same batch mixed as one shard needs communication, so the check above can fail.
    one = lambda x: mixing.mix_tokens(x, mixing.mixtoken_mask_from_box((0, 0, 2, 2), (4, 4)))
    text = jax.jit(one, in_shardings=split, out_shardings=split).lower(tokens).compile().as_text()
    assert any(kind in text for kind in BETWEEN_DEVICES)


def mix_both(key, images, targets, *, mixup, cutmix, shards=1):
    mix = mixing.draw_image_mix(key, images.shape[1:3], shards, mixup=mixup, cutmix=cutmix)
    return mixing.mix_images(images, mix), mixing.mix_by_area(targets, mix)


def test_image_mixing_without_an_alpha_raises():
    with pytest.raises(ValueError, match="alpha above 0"):
        mixing.draw_image_mix(jax.random.key(0), (8, 8), mixup=0.0, cutmix=0.0)


@pytest.mark.slow
def test_mixup_blends_images_and_targets_alike():
    """Images that contain their own target: both stay equal; partners are mirrored in the shard."""
    targets = np.eye(8, dtype=np.float32)
    images = np.broadcast_to(targets[:, None, None, :], (8, 4, 4, 8))
    lams = []
    for seed in range(20):
        x, t = mix_both(jax.random.key(seed), images, targets, mixup=0.8, cutmix=0.0, shards=2)
        np.testing.assert_allclose(x, np.broadcast_to(t[:, None, None, :], x.shape), atol=1e-6)
        np.testing.assert_allclose(t.sum(1), 1, atol=1e-6)
        lam = np.diag(t)
        np.testing.assert_allclose(t[np.arange(8), [3, 2, 1, 0, 7, 6, 5, 4]], 1 - lam, atol=1e-6)
        np.testing.assert_allclose(lam[:4], lam[0], atol=1e-6)
        lams += [lam[0], lam[4]]
    assert len(set(np.round(lams, 5))) > 30


def test_cutmix_targets_are_fractions_of_pixels():
    targets = np.eye(8, dtype=np.float32)
    images = np.broadcast_to(targets[:, None, None, :], (8, 16, 12, 8))
    for seed in range(20):
        x, t = mix_both(jax.random.key(seed), images, targets, mixup=0.0, cutmix=1.0, shards=2)
        assert set(np.unique(x)) <= {0.0, 1.0}
        np.testing.assert_allclose(np.mean(x, (1, 2)), t, atol=1e-6)


def test_mixup_and_cutmix_take_turns():
    targets = np.eye(4, dtype=np.float32)
    images = np.broadcast_to(targets[:, None, None, :], (4, 16, 16, 4))
    run = jax.jit(lambda key: mix_both(key, images, targets, mixup=0.8, cutmix=1.0))
    cut = 0
    for seed in range(60):
        x, t = run(jax.random.key(seed))
        np.testing.assert_allclose(np.mean(x, (1, 2)), t, atol=1e-6)
        cut += set(np.unique(x)) <= {0.0, 1.0}
    assert 18 <= cut <= 42


def test_every_shard_draws_mixup_or_cutmix():
    """One shard draws what the whole batch drew when there was one choice for all."""

    def draw(key, shards):
        mix = mixing.draw_image_mix(key, (16, 16), shards, mixup=0.8, cutmix=1.0)
        return mix.blend == 1, mix.mask.any((1, 2))

    keys = jax.random.split(jax.random.key(5), 60)
    cut, masked = (np.asarray(x) for x in jax.jit(jax.vmap(lambda key: draw(key, 8)))(keys))  # [60, 8]
    assert 200 <= cut.sum() <= 280
    assert sum(0 < n < 8 for n in cut.sum(1)) > 50  # both in one step
    assert not masked[~cut].any()
    one = jax.jit(jax.vmap(lambda key: draw(key, 1)))(keys)[0]
    whole = jax.vmap(lambda key: jax.random.bernoulli(jax.random.split(key, 3)[0]))(keys)
    np.testing.assert_array_equal(one[:, 0], whole)


def test_impossible_masks(unchecked_shapes):
    for grid, options in [((0, 4), {}), ((4, 4), {"shards": 0}), ((4, 4), {"alpha": 0.0})]:
        with pytest.raises(ValueError, match="MixToken needs alpha > 0, a grid and a shard"):
            mixing.draw_mixtoken_mask(jax.random.key(0), grid, **options)
    with pytest.raises(ValueError, match="A batch of 3 images cannot be mixed in 2 equal shards"):
        mixing.mix_by_area(
            np.ones((3, 5), np.float32), mixing.draw_mixtoken_mask(jax.random.key(0), (4, 4), 2)
        )
