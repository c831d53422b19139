"""RandAugment on the host draws its operations as published."""

import collections

import numpy as np
import pytest
import tensorflow as tf
import tiny_images

from tlvit.data.transforms import randaugment
from tlvit.ops.randaugment_policy import OPS, AugmentPolicy, parse_policy


def test_draws_follow_the_policy(monkeypatch):
    """The distributions of magnitudes, signs and operations over many seeds."""
    policy = AugmentPolicy(magnitude=9, layers=2, noise=0.5)
    seen = []

    def spy(image, op, level, sign):
        seen.append((op, level, sign))
        return image, tf.constant([[1.0, 0, 0], [0, 1, 0]])

    monkeypatch.setattr(randaugment, "apply_op", spy)

    @tf.function
    def draw(seed):
        seen.clear()
        randaugment.rand_augment(tf.zeros([4, 4, 3], tf.uint8), seed, policy)
        return [tf.stack([tf.cast(x, tf.float32) for x in layer]) for layer in seen]

    drawn = np.array([draw(tf.constant([3, i], tf.int64)) for i in range(3000)]).reshape(-1, 3)
    counts = collections.Counter(drawn[:, 0].astype(int))
    assert abs(counts.pop(len(OPS)) / 6000 - 0.5) < 0.03
    assert sorted(counts) == list(range(15))
    assert max(abs(n - 200) for n in counts.values()) < 60  # 4.3 standard deviations
    levels = drawn[:, 1] * 10
    assert abs(np.median(levels) - 9) < 0.05
    assert abs(np.quantile(levels, 0.16) - 8.5) < 0.05
    assert levels.max() == 10
    assert 0.01 < (levels == 10).mean() < 0.04  # two standard deviations: 2.3 %
    assert set(drawn[:, 2]) == {-1.0, 1.0}
    assert abs(drawn[:, 2].mean()) < 0.06


@pytest.mark.slow
def test_one_seed_gives_one_image():
    policy = parse_policy("rand-m9-n2-mstd0.5-inc1")
    run = tf.function(lambda x, seed: randaugment.rand_augment(x, seed, policy))
    image = tf.constant(tiny_images.photographs()[0])
    results = [run(image, tf.constant([1, i], tf.int64)) for i in range(12)]
    again = run(image, tf.constant([1, 5], tf.int64))
    np.testing.assert_array_equal(results[5][0], again[0])
    np.testing.assert_array_equal(results[5][1], again[1])
    assert len({result[0].numpy().tobytes() for result in results}) > 6
    assert results[0][0].shape == image.shape


def test_the_interpolation_of_a_recipe(monkeypatch):
    """ "random" draws for each operation, and the operations that are drawn do not depend on it."""
    policy = AugmentPolicy(magnitude=9, layers=2, noise=0.5)
    seen = []

    def spy(image, op, level, sign, bicubic=False):
        seen.append(tf.stack([tf.cast(x, tf.float32) for x in (op, level, sign, bicubic)]))
        return image, tf.constant([[1.0, 0, 0], [0, 1, 0]])

    monkeypatch.setattr(randaugment, "apply_op", spy)

    @tf.function
    def draw(seed):
        seen.clear()
        for kind in ("bilinear", "bicubic", "random"):
            randaugment.rand_augment(tf.zeros([4, 4, 3], tf.uint8), seed, policy, kind)
        return tf.stack(seen)

    drawn = np.array([draw(tf.constant([3, i], tf.int64)) for i in range(300)]).reshape(300, 3, 2, 4)
    np.testing.assert_array_equal(drawn[:, 0, :, :3], drawn[:, 1, :, :3])
    np.testing.assert_array_equal(drawn[:, 0, :, :3], drawn[:, 2, :, :3])
    assert drawn[:, 0, :, 3].max() == 0
    assert drawn[:, 1, :, 3].min() == 1
    assert abs(drawn[:, 2, :, 3].mean() - 0.5) < 0.08
    assert abs(np.corrcoef(drawn[:, 2, :, 3].T)[0, 1]) < 0.2
