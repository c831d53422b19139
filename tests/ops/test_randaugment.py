"""RandAugment on the device: equal to the host's, which equals Pillow's; geometry; draws; cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import tiny_images
from sklearn.datasets import load_sample_images

from tlvit.data.transforms import randaugment as host
from tlvit.ops import randaugment as augment
from tlvit.ops.randaugment_policy import OPS, parse_policy

MOVES = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
CASES = [(level, sign) for level in (0.0, 0.3, 0.9, 1.0) for sign in (-1.0, 1.0)]


@pytest.fixture(scope="module")
def photographs():
    """uint8 [2, 224, 200, 3]."""
    china, flower = load_sample_images().images
    return np.stack([china[100:324, 200:400], flower[60:284, 300:500] // 2 + 30])


def apply_all(image, names):
    """Every case of every operation as one batch, by the device and by the host: (device, host, labels)."""
    labels = [(name, *case) for name in names for case in CASES]
    op = np.array([OPS.index(name) if name in OPS else len(OPS) for name, _, _ in labels], np.int32)
    level, sign = (np.array([x[i] for x in labels], np.float32) for i in (1, 2))
    images = np.broadcast_to(image, (len(labels), *image.shape)).astype(np.float32)
    ours = jax.tree.map(np.asarray, jax.jit(augment.apply_ops)(images, op, level, sign))
    drawn = [[tf.constant(x) for x in case] for case in zip(op, level, sign, strict=True)]
    theirs = [host.apply_op(tf.constant(image), *case) for case in drawn]
    return ours, [[x.numpy() for x in pair] for pair in theirs], labels


@pytest.mark.slow
def test_every_operation_equals_the_hosts(photographs):
    turned = []
    for photograph in photographs:
        (images, matrices), theirs, labels = apply_all(photograph, [*OPS, "none"])
        for ours, matrix, (image, expected), label in zip(images, matrices, theirs, labels, strict=True):
            np.testing.assert_array_equal(ours, np.clip(np.rint(ours), 0, 255))
            np.testing.assert_allclose(matrix, expected, atol=1e-6, err_msg=str(label))
            difference = np.abs(ours - image.astype(np.float32))
            if label[0] == "Rotate":
                turned.append(difference.mean())
                assert np.abs((ours - image).mean()) < 0.1, label
            elif label[0] in MOVES:
                assert np.quantile(difference, 0.98) <= 1, label  # the edge of what was filled in differs
                assert difference.mean() < 0.3, label
            else:
                assert difference.max() <= 1, label
    # Three interpolations along lines instead of one bilinear. (On the first photograph, which is all fine
    # detail, Pillow's own bilinear and bicubic rotations are 5 gray levels apart.)
    assert np.mean(turned) < 1.2


@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
def test_the_matrix_of_a_move_points_at_its_pixels(shape):
    image = tiny_images.position_image(0, *shape)
    (images, matrices), _, labels = apply_all(image, MOVES)
    for ours, matrix, label in zip(images, matrices, labels, strict=True):
        error, seen = position_error(ours, matrix)
        assert error < 1, label
        assert seen > 0.3


@pytest.mark.slow
def test_chains_keep_their_geometry(monkeypatch):
    """The whole function with moves only, over a geometry that is a crop and a flip already."""
    image = tiny_images.position_image(0, 120, 160)
    crop = image[20:84, 16:88][:, ::-1]
    geometry = np.array([[-72 / 160, 0, 88 / 160], [0, 64 / 120, 20 / 120]], np.float32)
    original = augment.apply_ops
    moves = jnp.array([OPS.index(name) for name in MOVES])
    moves_only = lambda x, op, level, sign: original(
        x, jnp.where(op == len(OPS), op, moves[op % 5]), level, sign
    )
    monkeypatch.setattr(augment, "apply_ops", moves_only)
    batch = 32
    images, geometries = jax.jit(augment.randaugment, static_argnums=3)(
        jax.random.key(0),
        np.broadcast_to(crop, (batch, *crop.shape)),
        np.broadcast_to(geometry, (batch, 2, 3)),
        parse_policy("rand-m6-n3-mstd0.5-inc1"),
    )
    assert images.dtype == np.uint8
    for image, matrix in zip(np.asarray(images), np.asarray(geometries), strict=True):
        error, seen = position_error(image, matrix, (120, 160))
        assert error < 1
        assert seen > 0.1
    changed = [not np.allclose(matrix, geometry) for matrix in np.asarray(geometries)]
    assert 20 < sum(changed) < 32


def position_error(image, matrix, source=None):
    """(Largest distance, in source pixels, between the position that a pixel's color encodes and the position
    that the matrix gives; fraction of the pixels that are compared). Filled pixels, whose blue is not 0, are
    left out."""
    height, width = image.shape[:2]
    source = source or (height, width)
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    told = np.tensordot(matrix, np.stack([x, y, np.ones_like(x)]), 1)
    kept = image[:, :, 2] == 0
    inner = np.zeros_like(kept)
    around = [kept[1:-1, 1:-1], kept[:-2, 1:-1], kept[2:, 1:-1], kept[1:-1, :-2], kept[1:-1, 2:]]
    inner[1:-1, 1:-1] = np.logical_and.reduce(around)
    error = np.abs(image[:, :, :2].transpose(2, 0, 1) / 255.0 - told) * np.array(source[::-1])[:, None, None]
    return error[:, inner].max(), inner.mean()


@pytest.mark.slow
def test_draws_are_the_keys_and_follow_the_policy(photographs, monkeypatch):
    policy = parse_policy("rand-m9-n2-mstd0.5-inc1")
    images, geometry = np.stack([photographs[0]] * 6), np.stack([np.eye(3, dtype=np.float32)[:2]] * 6)
    run = jax.jit(augment.randaugment, static_argnums=3)
    first, again, other = (run(jax.random.key(k), images, geometry, policy) for k in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (np.asarray(first[0]) != np.asarray(other[0])).any()
    assert len({np.asarray(x).tobytes() for x in first[0]}) > 2

    seen = []
    still = jnp.broadcast_to(jnp.eye(3)[None, :2], (6000, 2, 3))
    monkeypatch.setattr(augment, "apply_ops", lambda x, *drawn: (seen.append(drawn), (x, still))[1])
    augment.randaugment(jax.random.key(0), jnp.zeros((6000, 1, 1, 3)), still, policy)
    op, level, sign = (np.concatenate([np.asarray(drawn[i]) for drawn in seen]) for i in range(3))
    counts = np.bincount(op, minlength=16)
    assert abs(counts[15] / 12000 - 0.5) < 0.02
    assert np.abs(counts[:15] - 400).max() < 85
    assert abs(np.median(level) - 0.9) < 0.005
    assert abs(np.quantile(level, 0.16) - 0.85) < 0.005
    assert 0.015 < (level == 1).mean() < 0.03
    assert abs(sign.mean()) < 0.04
    assert set(sign) == {-1.0, 1.0}


@pytest.mark.slow
def test_batches_on_a_mesh_stay_where_they_are(photographs):
    """Eight devices: the same images as on one, and no communication between them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    images = np.stack([photographs[0][:64, :64]] * 16)
    level, sign = np.full(16, 0.9, np.float32), np.ones(16, np.float32)
    run = jax.jit(augment.apply_ops, in_shardings=split, out_shardings=split)
    arguments = images.astype(np.float32), np.arange(16, dtype=np.int32), level, sign
    compiled = run.lower(*arguments).compile()
    text = compiled.as_text()
    for kind in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert kind not in text
    alone = jax.jit(augment.apply_ops)(*map(jnp.asarray, arguments))
    for a, b in zip(run(*arguments), alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_wrong_shapes_are_refused(unchecked_shapes):
    policy = parse_policy("rand-m9-inc1")
    with pytest.raises(ValueError, match=r"\(2, 8, 8, 4\)"):
        augment.randaugment(jax.random.key(0), jnp.zeros((2, 8, 8, 4)), jnp.zeros((2, 2, 3)), policy)
