"""The order of the training images is a pure function of (seed, epoch, position) and visits every record."""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tlvit.data import shuffle
from tlvit.data.shuffle import Order, batch_permutation, make_order, ordered_records

LENGTHS = (13, 12, 7, 20, 12)  # 64 records


def ids(shard, offset):
    """A record is its number in the data set."""
    starts = tf.constant(np.cumsum((0, *LENGTHS)), tf.int64)
    return tf.data.Dataset.range(starts[shard] + offset, starts[shard + 1])


@functools.cache
def take(order, steps, **kwargs):
    """Records and counters of the first `steps` batches [steps, B / n]."""
    data = ordered_records(ids, order, **kwargs)
    local = order.batch_size // kwargs.get("process_count", 1)
    pairs = list(itertools.islice(data.as_numpy_iterator(), steps * local))
    return tuple(np.array(x).reshape(steps, local) for x in zip(*pairs, strict=True))


ORDERS = [
    Order(LENGTHS, seed=3, batch_size=8, streams=1, window=64),
    Order(LENGTHS, seed=3, batch_size=8, streams=4, window=5),
    Order(LENGTHS, seed=3, batch_size=12, streams=2, window=100),
]
QUICK_ORDERS = [ORDERS[1], *(pytest.param(order, marks=pytest.mark.slow) for order in ORDERS[::2])]


@pytest.mark.parametrize("order", ORDERS)
def test_an_epoch_has_every_record_once_and_the_next_one_another_order(order):
    steps = order.steps_per_epoch
    records, counters = take(order, 3 * steps)
    assert (counters.ravel() == np.arange(3 * steps * order.batch_size)).all()
    epochs = records.reshape(3, -1)
    for epoch in epochs:
        assert len(set(epoch)) == steps * order.batch_size  # no record twice; for B = 8 that is all 64
    assert (epochs[0] != epochs[1]).mean() > 0.8
    assert (epochs[1] != epochs[2]).mean() > 0.8
    assert abs(np.corrcoef(epochs[0], np.arange(epochs.shape[1]))[0, 1]) < 0.5


@pytest.mark.parametrize("order", QUICK_ORDERS)
@pytest.mark.parametrize("first_step", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 7, 13))])
def test_starting_later_gives_the_same_batches(order, first_step):
    records, counters = take(order, 16)
    later, later_counters = take(order, 16 - first_step, first_step=first_step)
    np.testing.assert_array_equal(later, records[first_step:])
    np.testing.assert_array_equal(later_counters, counters[first_step:])


@pytest.mark.parametrize("order", QUICK_ORDERS)
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_processes_have_one_order(order, count):
    complete, _ = take(order, 11, first_step=3)
    parts = [take(order, 11, first_step=3, process_index=p, process_count=count)[0] for p in range(count)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), complete)


def test_a_process_reads_only_the_streams_of_its_slice():
    order, opened = ORDERS[1], []

    def spy(shard, offset):
        tf.py_function(lambda s, o: opened.append((int(s), int(o))), [shard, offset], [])
        return ids(shard, offset)

    data = ordered_records(spy, order, process_index=0, process_count=4)
    list(itertools.islice(data.as_numpy_iterator(), 2))
    assert 0 < len(opened) <= 6  # two or three windows of one of four streams, each of at most two shards


def test_starting_late_reads_one_window_of_each_stream_first():
    """Nothing before the window of the first step is read."""
    order, counts = Order(LENGTHS, seed=0, batch_size=4, streams=1, window=8), []

    def spy(shard, offset):
        return ids(shard, offset).map(
            lambda x: tf.py_function(lambda y: counts.append(int(y)) or y, [x], tf.int64)
        )

    data = ordered_records(spy, order, first_step=15)
    next(iter(data))
    assert len(counts) <= 3 * 8  # its own window, and the two that are read ahead


@pytest.mark.slow
def test_different_seeds_differ():
    a, b = (take(Order(LENGTHS, seed, 8, 4, 5), 8)[0] for seed in (0, 1))
    assert (a != b).mean() > 0.8


def test_records_that_the_last_batch_leaves_out_change_with_the_epoch():
    order = Order(LENGTHS, seed=0, batch_size=48, streams=1, window=64)
    records, _ = take(order, 6)
    assert len(set(records.ravel())) == 64


def test_the_shuffle_mixes_shards_within_a_batch():
    records, _ = take(ORDERS[0], 8)
    shards = np.searchsorted(np.cumsum(LENGTHS), records, side="right")
    assert min(len(set(batch)) for batch in shards) >= 3


def test_make_order_keeps_the_memory_budget():
    lengths = (1251,) * 1024
    order = make_order(lengths, seed=0, batch_size=1024, record_bytes=110_000, shuffle_bytes=2 << 30)
    held = order.streams * order.window * (110_000 + shuffle.MAP_BYTES) * shuffle.COPIES
    assert (order.streams, 0.9 * (2 << 30) < held <= 2 << 30) == (16, True)
    small = make_order((100, 100), seed=0, batch_size=64, record_bytes=2000, shuffle_bytes=2 << 30)
    assert (small.streams, small.window) == (1, 200)
    assert (
        make_order(lengths, seed=0, batch_size=12, record_bytes=110_000, shuffle_bytes=2 << 30).streams == 4
    )


def test_a_batch_that_cannot_be_filled_or_divided_is_an_error():
    with pytest.raises(ValueError, match="3 images do not fill one batch of 4"):
        make_order((3,), seed=0, batch_size=4, record_bytes=10, shuffle_bytes=100)
    with pytest.raises(ValueError, match="A batch of 8 images cannot be divided among 3 processes"):
        ordered_records(ids, ORDERS[0], process_count=3)
    with pytest.raises(ValueError, match=r"process_index must be in \[0, 2\), not 2"):
        ordered_records(ids, ORDERS[0], process_index=2, process_count=2)


def test_a_shard_that_ends_early_is_an_error_not_a_shift():
    def short(shard, offset):
        return ids(shard, offset).take(5)

    with pytest.raises(tf.errors.InvalidArgumentError, match="a shard ends early"):
        list(itertools.islice(ordered_records(short, ORDERS[0]).as_numpy_iterator(), 8))


@pytest.mark.parametrize("streams_and_window", [(1, 64), (4, 5), (2, 9)])
def test_repeats_give_views_of_an_image_in_a_row(streams_and_window):
    streams, window = streams_and_window
    order = Order(LENGTHS, seed=3, batch_size=24, streams=streams, window=window, repeats=3)
    assert order.steps_per_epoch == 2  # as many steps as without repeats
    records, counters = take(order, 6)
    assert (counters.ravel() == np.arange(6 * 24)).all()
    epochs = records.reshape(3, 2, 24)
    for epoch in epochs:
        seen, counts = np.unique(epoch, return_counts=True)
        assert len(seen) == 16  # a third of the 48 positions
        assert (counts == 3).all()
        for batch in epoch.reshape(2, streams, 24 // streams):
            for part in batch:  # of one stream
                assert len(np.unique(part)) <= -(-len(part) // 3) + 1
    assert len(np.unique(records)) > 30  # other images in other epochs


@pytest.mark.slow
def test_repeats_do_not_depend_on_restarts_or_processes():
    order = Order(
        LENGTHS, seed=3, batch_size=16, streams=2, window=7, repeats=3
    )  # 3 does not divide the blocks
    complete, counters = take(order, 13)
    for first in (1, 3, 4, 7):
        later, later_counters = take(order, 13 - first, first_step=first)
        np.testing.assert_array_equal(later, complete[first:])
        np.testing.assert_array_equal(later_counters, counters[first:])
    parts = [take(order, 13, process_index=p, process_count=4)[0] for p in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), complete)


def placed(order, steps, **process):
    """Records and counters of `take`, every image in its place of the batch."""
    places = batch_permutation(order, **process)
    found = take(order, steps, **process)
    return found if places is None else tuple(x[:, places] for x in found)


@pytest.mark.parametrize(
    ("shards", "repeats", "streams", "window"),
    [
        (8, 3, 1, 64),
        pytest.param(12, 4, 4, 9, marks=pytest.mark.slow),
        pytest.param(8, 3, 4, 9, marks=pytest.mark.slow),
        pytest.param(2, 3, 4, 9, marks=pytest.mark.slow),
    ],
)
def test_views_are_spread_over_the_devices(shards, repeats, streams, window):
    """Every device has the images of a step only once, if there are as many devices as views."""
    alone = Order(LENGTHS, seed=3, batch_size=48, streams=streams, window=window, repeats=repeats)
    order = dataclasses.replace(alone, shards=shards)
    records, counters = placed(order, 2)
    expected, expected_counters = take(alone, 2)
    for batch, theirs in zip(records, expected, strict=True):
        assert sorted(batch) == sorted(theirs)  # the same views
        views = [np.unique(part, return_counts=True)[1].max() for part in batch.reshape(shards, -1)]
        assert max(views) == -(-repeats // min(shards, repeats))
    by_counter = dict(zip(counters.ravel(), records.ravel(), strict=True))
    assert by_counter == dict(zip(expected_counters.ravel(), expected.ravel(), strict=True))
    halves = [placed(order, 2, process_index=p, process_count=2)[0] for p in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), records)


def test_one_device_or_one_view_keeps_the_order():
    order = Order(LENGTHS, seed=3, batch_size=24, streams=2, window=9, repeats=3)
    assert batch_permutation(order) is None
    assert batch_permutation(dataclasses.replace(order, repeats=1, shards=8)) is None
    np.testing.assert_array_equal(order.positions(np.arange(24)), np.arange(24))


def test_a_process_reads_the_streams_of_its_group():
    """Eight devices and three views: groups of four devices, so one of two processes needs half of them."""
    order = Order(LENGTHS, seed=3, batch_size=32, streams=4, window=9, repeats=3, shards=8)
    assert order.positions(np.arange(16)).max() == 15
    assert sorted(order.positions(np.arange(32))) == list(range(32))
    np.testing.assert_array_equal(order.positions(np.arange(8)), [0, 4, 8, 12, 1, 5, 9, 13])


@pytest.mark.parametrize("streams_and_window", [pytest.param((1, 64), marks=pytest.mark.slow), (4, 9)])
def test_replacements_are_the_next_records_of_the_window(streams_and_window):
    order = Order(LENGTHS, 3, 8, *streams_and_window)
    plain, _ = take(order, 16)
    groups = [
        list(g)
        for g, _ in itertools.islice(ordered_records(ids, order, replacements=3).as_numpy_iterator(), 128)
    ]
    groups = np.array(groups).reshape(16, 8, 4)
    np.testing.assert_array_equal(groups[:, :, 0], plain)
    if order.streams == 1:
        flat = plain[:8].ravel()
        np.testing.assert_array_equal(groups[:8].reshape(64, 4), [np.roll(flat, -i)[:4] for i in range(64)])
    assert all(len(set(g)) == 4 for g in groups.reshape(-1, 4))


def test_a_short_last_window_is_merged_so_that_its_records_have_replacements():
    """9 records in windows of 8 are permuted together. A last window that is not read changes nothing."""
    nine = lambda shard, offset: tf.data.Dataset.range(offset, 9)
    order = Order((9,), seed=3, batch_size=1, streams=1, window=8)
    found = ordered_records(nine, order, replacements=4).take(27).as_numpy_iterator()
    groups = np.array([group for group, _ in found])
    assert all(len(set(group)) == 5 for group in groups)
    assert all(set(epoch) == set(range(9)) for epoch in groups[:, 0].reshape(3, 9))
    for step in (8, 9, 17):  # in the last window, at the start of an epoch, and in the last window again
        later = ordered_records(nine, order, replacements=4, first_step=step).take(27 - step)
        np.testing.assert_array_equal([group for group, _ in later.as_numpy_iterator()], groups[step:])
    lengths = lambda order, count: [
        int(shuffle.window_length(order, tf.constant(i, tf.int64))) for i in range(count)
    ]
    assert (order.windows_per_epoch, lengths(order, 1)) == (1, [9])
    unread = dataclasses.replace(order, batch_size=8)
    assert (unread.windows_per_epoch, lengths(unread, 2)) == (1, [8, 1])
    long_enough = dataclasses.replace(order, shard_lengths=(24,), window=16)
    assert (long_enough.windows_per_epoch, lengths(long_enough, 2)) == (2, [16, 8])
    assert lengths(dataclasses.replace(order, shard_lengths=(23,)), 2) == [8, 15]


MEMORY = """
import itertools, sys, threading, time
import tlvit.data
import tensorflow as tf
from tlvit.data.shuffle import make_order, ordered_records

folder, budget, count = sys.argv[1], int(sys.argv[2]), 40
files = tf.constant(sorted(tf.io.gfile.glob(folder + "/*.tfrecord")))

def records(shard, offset):
    return tf.data.TFRecordDataset(files[shard], buffer_size=1 << 20).skip(tf.cast(offset, tf.int64))

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS"))

def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.002)

def run(order, steps):
    data = ordered_records(records, order).map(lambda r, c: tf.strings.length(r), num_parallel_calls=2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 2
    list(itertools.islice(data.batch(order.batch_size).with_options(options).as_numpy_iterator(), steps))

lengths = (count,) * len(files)
warm = make_order(lengths, seed=0, batch_size=64, record_bytes=110_000, shuffle_bytes=1 << 20)
run(warm, 2)  # what TensorFlow takes for itself
peak = [resident()]
before = peak[0]
threading.Thread(target=watch, daemon=True).start()
order = make_order(lengths, seed=0, batch_size=64, record_bytes=110_000, shuffle_bytes=budget)
run(order, 3 * order.steps_per_epoch)
print("grown", peak[0] - before, "streams", order.streams, "window", order.window)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_the_memory_budget_is_kept(tmp_path):
    """Records of 110 KB on average, 211 MB in all, in a process of its own; three epochs."""
    rng = np.random.default_rng(0)
    for shard in range(48):
        with tf.io.TFRecordWriter(str(tmp_path / f"{shard:02d}.tfrecord")) as writer:
            for size in rng.integers(40_000, 180_000, 40):
                writer.write(rng.bytes(int(size)))
    for budget in (64 << 20, 160 << 20):
        command = [sys.executable, "-c", MEMORY, str(tmp_path), str(budget)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        words = done.stdout.split()
        assert words[0] == "grown"
        assert int(words[1]) <= budget, done.stdout
        assert int(words[3]) > 1  # several streams
