"""3-Augment and color jitter."""

import collections

import numpy as np
import PIL.Image
import PIL.ImageOps
import tensorflow as tf
import tiny_images

from tlvit.data.transforms.three_augment import color_jitter, three_augment


def test_color_jitter():
    photograph = tiny_images.photographs()[0]
    seeds = [tf.constant([0, i], tf.int64) for i in range(6)]
    jittered = [color_jitter(tf.constant(photograph), seed, 0.3).numpy() for seed in seeds]
    assert len({x.tobytes() for x in jittered}) == 6
    for x in jittered:
        assert 0.2 < np.abs(x.astype(int) - photograph).mean() < 60


def test_three_augment_draws_each_of_its_operations():
    photograph = tiny_images.photographs()[0]
    expected = [
        np.asarray(PIL.ImageOps.grayscale(PIL.Image.fromarray(photograph)).convert("RGB")),
        np.asarray(PIL.ImageOps.solarize(PIL.Image.fromarray(photograph))),
    ]
    found = collections.Counter()
    for i in range(30):
        x = three_augment(tf.constant(photograph), tf.constant([0, i], tf.int64)).numpy().astype(int)
        which = [k for k in range(2) if np.abs(x - expected[k]).max() <= 1]
        found[which[0] if which else "blur"] += 1
        if not which:
            assert abs(x.mean() - photograph.mean()) < 1
    assert set(found) == {0, 1, "blur"}
    assert min(found.values()) >= 4
