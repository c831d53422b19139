"""Native checkpoints: bit-equal, kept as documented, on other meshes, after crashes and full disks."""

import dataclasses
import json
import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, refuse_folders
from flax import nnx

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import Checkpoints, load_model, restore_for_inference, save_model_folder
from tlvit.models.functional import functionalize
from tlvit.training import mesh as sharding
from tlvit.training.state import TrainState, state_from


def make_state(step=0, *, seed=0, width=4, ema=True, devices=8):
    """A small TrainState at a step, on the first devices; its values depend on (seed, step)."""
    rng = np.random.RandomState(1000 * seed + step)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {"blocks": {str(i): {"kernel": draw(3, width), "bias": draw(width)} for i in range(2)}}
    stats = {"bn": {"mean": draw(5), "var": draw(5)}}
    tx = optax.adam(1e-3)
    state = state_from(params, stats, tx, seed=seed, ema=ema)
    grads = jax.tree.map(jnp.ones_like, params)
    state = TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        stats=stats,
        opt_state=tx.update(grads, state.opt_state, params)[1],
        ema=jax.tree.map(lambda x: 2 * x, {"params": params, "stats": stats}) if ema else None,
        key=jax.random.fold_in(jax.random.key(seed), 3),
    )
    return jax.device_put(state, sharding.replicated(sharding.make_mesh(jax.devices()[:devices])))


def to_numpy(state):
    """Every leaf as a NumPy array, the key as its data."""
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(plain(x)) for x in jax.tree.leaves(state)]


def assert_equal(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for ours, theirs in zip(to_numpy(state), to_numpy(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def save_steps(folder, steps, *, keep=3, scores=None):
    ours = Checkpoints(folder, keep=keep)
    for i, step in enumerate(steps):
        ours.save(make_state(step), score=scores[i] if scores else None, extra={"at": step})
    ours.close()


def folders(path):
    return sorted(p.name for p in path.iterdir())


def test_round_trip_is_bit_equal(tmp_path):
    """Parameters, statistics, optimizer, average, key and step; the restored key draws the same numbers."""
    state = make_state(7, seed=3)
    ours = Checkpoints(tmp_path)
    ours.save(state, score=61.5, extra={"model": "lvvit_s", "image_size": [48, 48], "class_names": None})
    ours.close()
    again = Checkpoints(tmp_path)
    restored, extra = again.restore(make_state(0, seed=9))
    assert_equal(restored, state)
    assert restored.key == state.key
    np.testing.assert_array_equal(jax.random.normal(restored.key, (3,)), jax.random.normal(state.key, (3,)))
    assert extra == {"model": "lvvit_s", "image_size": [48, 48], "class_names": None}
    assert (again.steps(), again.best_step()) == ([7], 7)
    again.close()


def test_restoring_into_shapes_and_a_state_without_average(tmp_path):
    """The target may consist of shapes, and a run may have no moving average."""
    state = make_state(2, ema=False)
    ours = Checkpoints(tmp_path)
    assert ours.restore(state) is None
    assert (ours.steps(), ours.best_step()) == ([], None)
    ours.save(state)
    ours.wait()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    shapes = TrainState(**{**vars(shapes), "key": state.key})
    assert_equal(ours.restore(shapes)[0], state)
    assert ours.best_step() is None
    ours.close()


def test_the_state_may_be_donated_at_once(tmp_path):
    """The state at the time of `save` is written, although the next step reuses its memory meanwhile."""
    state = make_state(1)
    expected = to_numpy(state)
    overwrite = jax.jit(
        lambda s: jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, s), donate_argnums=0
    )
    overwrite(make_state(1))  # compiles, so that nothing delays the donation below
    ours = Checkpoints(tmp_path)
    ours.save(state)
    for _ in range(3):
        state = overwrite(state)
    ours.close()
    again = Checkpoints(tmp_path)
    restored, _ = again.restore(state)
    again.close()
    for a, b in zip(to_numpy(restored), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ([10.0, 50.0, 20.0, 30.0, 40.0, 45.0], ["2", "5", "6"], 2),
        ([10.0, 50.0, 20.0, 30.0, 40.0, 60.0], ["5", "6"], 6),
        ([10.0, 50.0, 50.0, 30.0, 40.0, 45.0], ["3", "5", "6"], 3),  # a tie: the later one
        ([None, 0.0, None, None, None, None], ["2", "5", "6"], 2),  # 0 % is a score, None is not
        ([50.0, None, None, None, None, None], ["1", "5", "6"], 1),
    ],
)
def test_the_last_ones_and_the_best_one_are_kept(tmp_path, scores, kept, best):
    save_steps(tmp_path, range(1, 7), keep=2, scores=scores)
    assert folders(tmp_path) == kept
    again = Checkpoints(tmp_path, keep=2)
    assert (again.best_step(), again.steps()) == (best, [int(s) for s in kept])
    assert_equal(again.restore(make_state(), step=best)[0], make_state(best))
    again.close()


def test_a_saved_step_is_not_saved_again(tmp_path):
    save_steps(tmp_path, [4])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    ours = Checkpoints(tmp_path)
    ours.save(make_state(4, seed=1), score=99.0)
    ours.close()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


def test_restoring_on_other_meshes(tmp_path):
    """Eight devices -> one -> four, bit for bit, placed as the target."""
    state = make_state(1)
    for count in (8, 1, 4):
        target = make_state(0, devices=count)
        ours = Checkpoints(tmp_path)
        ours.save(state)
        ours.wait()
        state, _ = ours.restore(target)
        ours.close()
        assert_equal(state, make_state(1))
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
            assert len(leaf.sharding.device_set) == count
        shutil.rmtree(tmp_path / "1")


def test_rating_a_step_replaces_its_score_and_record(tmp_path):
    """Then another checkpoint may be the best, and the one before it is removed."""
    ours = Checkpoints(tmp_path, keep=2)
    for step, score in ((1, 50.0), (2, 20.0), (3, None), (4, None)):
        ours.save(make_state(step), score=score, extra={"at": step})
    ours.wait()
    assert (ours.best_step(), folders(tmp_path)) == (1, ["1", "3", "4"])
    ours.save(make_state(5))
    ours.rate(5, score=60.0, extra={"at": 5, "best_weights": "ema"})  # waits for step 5
    assert (ours.best_step(), folders(tmp_path)) == (5, ["4", "5"])
    assert ours.record(5) == {"at": 5, "best_weights": "ema"}
    ours.close()
    again = Checkpoints(tmp_path, keep=2)
    restored, extra = again.restore(make_state())
    assert_equal(restored, make_state(5))
    assert (extra["best_weights"], again.best_step()) == ("ema", 5)
    again.close()


# Disks that fail


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path, caplog, monkeypatch):
    """Orbax makes the folder in the background by default and then waits 300 s for it."""
    ours = Checkpoints(tmp_path)
    ours.save(make_state(1))
    ours.wait()
    refuse_folders(monkeypatch, "orbax-checkpoint-tmp")
    reason = "Operation not permitted. The checkpoint of step 1 is complete"
    with pytest.raises(OSError, match=rf"A checkpoint cannot be written to {tmp_path}: {reason}"):
        ours.save(make_state(2))
    assert "Traceback" not in caplog.text
    ours.close()
    assert_equal(Checkpoints(tmp_path).restore(make_state())[0], make_state(1))


@pytest.fixture
def small_files():
    """No file may grow beyond a megabyte, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_in_the_background_is_reported_by_the_next_check(tmp_path, caplog, small_files):
    noise = jnp.asarray(np.random.RandomState(0).standard_normal(1 << 20), jnp.float32)  # 4 MB
    ours = Checkpoints(tmp_path)
    ours.save(state_from({"a": noise}, {}, optax.sgd(0.1), ema=False))
    while ours._manager.is_saving_in_progress():
        time.sleep(0.01)
    with pytest.raises(OSError, match=r"cannot be written to .*: File too large\. There is none yet"):
        ours.check()
    ours.close()
    assert "Traceback" not in caplog.text
    assert not [name for name in folders(tmp_path) if name.isdigit()]


def delete(*names):
    def damage(step):
        for name in names:
            path = step / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def truncate(step):
    """Cuts every file with arrays in half, as a full disk does."""
    files = [p for p in (step / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(step):
    for path in [p for p in step.rglob("*") if p.is_file()]:
        path.unlink()


@pytest.mark.parametrize(
    "damage",
    [delete("state"), delete("extra"), delete("state/_METADATA"), delete("state/manifest.ocdbt"),
     delete("state/d"), delete("_CHECKPOINT_METADATA", "state"), truncate, empty],
    ids=["state", "extra", "tree", "manifest", "data", "metadata", "truncated", "empty"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_skipped_and_its_step_can_be_saved_again(tmp_path, caplog, damage):
    save_steps(tmp_path, [1, 2, 3])
    damage(tmp_path / "3")
    ours = Checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING, logger="tlvit"):
        restored, extra = ours.restore(make_state())
    assert_equal(restored, make_state(2))
    assert extra == {"at": 2}
    assert "checkpoint of step 3 cannot be read and is skipped" in caplog.text
    assert folders(tmp_path) == ["1", "2", "3.unreadable"]
    assert ours.steps() == [1, 2]
    ours.save(make_state(3, seed=5))
    ours.wait()
    assert_equal(ours.restore(make_state())[0], make_state(3, seed=5))
    ours.close()


def files_of(step):
    return sorted(str(p.relative_to(step)) for p in step.rglob("*") if p.is_file())


def flip(path):
    """Changes one bit in the middle."""
    data = bytearray(path.read_bytes() or b"x")
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        *(pytest.param(f, marks=pytest.mark.slow) for f in (halve, replace_by_folder, pathlib.Path.unlink)),
    ],
)
def test_no_damaged_file_is_taken_for_data(tmp_path, damage):
    """Whichever file of the last checkpoint is damaged: the state is that step's, or the one before."""
    save_steps(tmp_path / "whole", [1, 2], scores=[10.0, 20.0])
    skipped = set()
    for i, name in enumerate(files_of(tmp_path / "whole" / "2")):
        copy = shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        damage(copy / "2" / name)
        with Checkpoints(copy) as ours:
            assert ours.best_step() == (1 if name == "metrics/metrics" else 2) or name == "checksums.json"
            restored, extra = ours.restore(make_state())
        assert extra == {"at": int(restored.step)}
        assert_equal(restored, make_state(int(restored.step)))
        skipped |= {name} if int(restored.step) == 1 else set()
    assert {"extra/metadata", "state/manifest.ocdbt"} < skipped
    assert len(skipped) > 8


def test_an_earlier_damaged_checkpoint_does_not_matter(tmp_path):
    save_steps(tmp_path, [1, 2, 3])
    truncate(tmp_path / "2")
    ours = Checkpoints(tmp_path)
    assert_equal(ours.restore(make_state())[0], make_state(3))
    assert folders(tmp_path) == ["1", "2", "3"]
    with pytest.raises(ValueError, match=r"None of the checkpoints of steps \[2\] can be read"):
        ours.restore(make_state(), step=2)
    ours.close()


def test_nothing_readable_is_an_error_and_nothing_is_renamed(tmp_path):
    """A run must not silently start over, and must not rename checkpoints that may be repaired by hand."""
    save_steps(tmp_path, [1, 2])
    for step in ("1", "2"):
        truncate(tmp_path / step)
    ours = Checkpoints(tmp_path)
    with pytest.raises(
        ValueError, match=r"None of the checkpoints of steps \[1, 2\] can be read: .*1/state.* damaged"
    ):
        ours.restore(make_state())
    ours.close()
    assert folders(tmp_path) == ["1", "2"]


def test_a_step_that_is_damaged_twice(tmp_path):
    """A second unreadable checkpoint of one step must not replace a readable one."""
    save_steps(tmp_path, [1, 2, 3])
    truncate(tmp_path / "3")
    ours = Checkpoints(tmp_path)
    ours.restore(make_state())
    ours.save(make_state(3))
    ours.close()
    truncate(tmp_path / "3")
    ours = Checkpoints(tmp_path)
    restored, _ = ours.restore(make_state())
    ours.close()
    assert int(restored.step) == 2


def test_another_model_is_refused_and_its_arrays_listed(tmp_path):
    save_steps(tmp_path, [1, 2])
    ours = Checkpoints(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"step 2 belongs to another model or optimizer, 16 arrays differ:\n"
        r"  ema/params/blocks/0/bias: saved \(4,\), this run \(6,\)",
    ) as caught:
        ours.restore(make_state(width=6))
    assert str(caught.value).count("\n") == 5  # the first five arrays
    with pytest.raises(ValueError, match=r"6 arrays differ:\n  ema/params.*: saved \(4,\), this run nothing"):
        ours.restore(make_state(ema=False))
    ours.close()
    assert folders(tmp_path) == ["1", "2"]


KILLED = """
import dataclasses, sys
import jax.numpy as jnp, optax
from tlvit.checkpoints.native import Checkpoints
from tlvit.training.state import state_from
ours = Checkpoints(sys.argv[1])
for n, said in ((1, "first"), (2, "second")):
    state = state_from({"a": jnp.full((4 << 20,), float(n))}, {}, optax.sgd(0.1), ema=False)
    ours.save(dataclasses.replace(state, step=jnp.asarray(n, jnp.int32)))
    ours.wait()
    print(said, flush=True)
"""


def test_killed_in_the_middle_of_a_save(tmp_path):
    """kill -9 as soon as the folder of the second save appears: the incomplete folder is not a checkpoint."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "first\n"
    deadline = time.monotonic() + 60
    while not any(p.name.startswith("2.") for p in tmp_path.iterdir()) and time.monotonic() < deadline:
        pass
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read()
    assert process.wait() == -signal.SIGKILL
    assert rest == ""
    assert [n for n in folders(tmp_path) if n.startswith("2.")], "killed too late to prove anything"
    state = state_from({"a": jnp.zeros(4 << 20)}, {}, optax.sgd(0.1), ema=False)
    ours = Checkpoints(tmp_path)
    restored, _ = ours.restore(state)
    assert int(restored.step) == 1
    assert float(restored.params["a"].min()) == float(restored.params["a"].max()) == 1.0
    assert ours.steps() == [1]
    ours.save(make_state(2))  # the interrupted step can be saved
    ours.close()
    assert "2" in folders(tmp_path)


# Model folders


INFO = ModelInfo("lvvit_s", 5, (48, 48), {"dim": 32}, class_names=tuple("abcde"))


class Small(nnx.Module):
    """A model with parameters and, unless `plain`, statistics."""

    def __init__(self, *, plain=False):
        rng = np.random.RandomState(0)
        self.blocks = nnx.List([nnx.Linear(3, 4, rngs=nnx.Rngs(0))])
        self.gain = nnx.Param(jnp.asarray(rng.standard_normal((3, 4)), jnp.float32))
        if not plain:
            self.mean = nnx.BatchStat(jnp.arange(5, dtype=jnp.float32))


def test_model_folder_round_trip(tmp_path):
    """Arrays of eight devices open on one; the JSON is unchanged."""
    model = Small()
    everywhere = sharding.replicated(sharding.make_mesh())
    nnx.update(model, jax.device_put(nnx.state(model), everywhere))
    _, params, stats = functionalize(model)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(params))
    save_model_folder(tmp_path / "m", model, INFO)
    found_params, found_stats, record = load_model(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, (found_params, found_stats), (params, stats))
    assert record == json.loads(json.dumps(INFO.to_json()))
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(found_params))


def test_model_without_statistics(tmp_path):
    model = Small(plain=True)
    save_model_folder(tmp_path / "m", model, INFO)
    found, stats, _ = load_model(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, found, functionalize(model)[1])
    assert stats == {}


def test_model_folders_are_not_overwritten(tmp_path):
    (tmp_path / "m").mkdir()  # an empty folder may be used
    save_model_folder(tmp_path / "m", Small(), INFO)
    with pytest.raises(ValueError, match=r"m exists already; choose another folder"):
        save_model_folder(tmp_path / "m", Small(), dataclasses.replace(INFO, model="lvvit_m"))
    assert load_model(tmp_path / "m")[2]["model"] == "lvvit_s"


def test_no_damaged_file_of_a_model_folder_is_taken_for_data(tmp_path):
    model = Small()
    save_model_folder(tmp_path / "m", model, INFO)
    for i, name in enumerate(files_of(tmp_path / "m")):
        copy = shutil.copytree(tmp_path / "m", tmp_path / str(i))
        flip(copy / name)
        if name.endswith(("_CHECKPOINT_METADATA", "commit_success.txt")):  # they hold no data
            params, _, record = load_model(copy)
            jax.tree.map(np.testing.assert_array_equal, params, functionalize(model)[1])
            assert record == json.loads(json.dumps(INFO.to_json()))
        else:
            with pytest.raises(ValueError, match=f"The model folder {copy} cannot be read"):
                load_model(copy)


def test_folders_that_are_not_model_folders(tmp_path):
    with pytest.raises(ValueError, match=r"nothing is not a tlvit model folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"is not a tlvit model folder \(model/ and info/ expected\)"):
        load_model(tmp_path)
    save_model_folder(tmp_path / "m", Small(), INFO)
    delete("model/d")(tmp_path / "m")
    with pytest.raises(ValueError, match=r"The model folder .*m cannot be read: .* is missing"):
        load_model(tmp_path / "m")


# Weights of a run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Steps 1, 2, 3 with scores 10, 30, 20; the average is twice the raw weights."""
    path = tmp_path_factory.mktemp("run")
    save_steps(path / "checkpoints", [1, 2, 3], scores=[10.0, 30.0, 20.0])
    return path


@pytest.mark.parametrize(
    ("options", "step", "factor"),
    [
        ({}, 2, 2),
        ({"weights": "raw"}, 2, 1),
        ({"weights": "ema"}, 2, 2),
        ({"step": 3}, 3, 2),
        ({"step": 1, "weights": "raw"}, 1, 1),
    ],
)
def test_weights_of_a_run(workdir, options, step, factor):
    """By default the EMA weights of the best step, on one device, without the optimizer."""
    params, stats, extra = restore_for_inference(workdir, **options)
    expected = make_state(step)
    same = lambda a, b: np.testing.assert_array_equal(a, factor * np.asarray(b))
    jax.tree.map(same, (params, stats), (expected.params, expected.stats))
    assert extra == {"at": step, "step": step, "weights": "ema" if factor == 2 else "raw"}
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves((params, stats)))


def test_weights_of_a_run_without_average_or_scores(tmp_path):
    ours = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        ours.save(make_state(step, ema=False))
    ours.close()
    params, _, extra = restore_for_inference(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, make_state(2, ema=False).params)
    assert (extra["step"], extra["weights"]) == (2, "raw")
    with pytest.raises(ValueError, match=r"step 2 in .* has no EMA weights"):
        restore_for_inference(tmp_path, weights="ema")


@pytest.mark.parametrize("best", ["raw", "ema"])
def test_the_weights_that_scored_best(tmp_path, best):
    ours = Checkpoints(tmp_path / "checkpoints")
    ours.save(make_state(1), extra={"best_weights": best})
    ours.close()
    params, _, extra = restore_for_inference(tmp_path)
    expected = make_state(1)
    expected = expected.ema["params"] if best == "ema" else expected.params
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert extra["weights"] == best
    other = "raw" if best == "ema" else "ema"
    assert restore_for_inference(tmp_path, weights=other)[2]["weights"] == other


def test_missing_and_damaged_weights_of_a_run(workdir, tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint"):
        restore_for_inference(tmp_path)
    with pytest.raises(ValueError, match=r"has no checkpoint of step 9 \(found: \[1, 2, 3\]\)"):
        restore_for_inference(workdir, step=9)
    with pytest.raises(ValueError, match="weights must be one of auto, ema, raw, not 'best'"):
        restore_for_inference(workdir, weights="best")
    shutil.copytree(workdir, tmp_path / "w")
    truncate(tmp_path / "w" / "checkpoints" / "2")
    with pytest.raises(ValueError, match=r"The checkpoint of step 2 in .* cannot be read: .* is damaged"):
        restore_for_inference(tmp_path / "w")
