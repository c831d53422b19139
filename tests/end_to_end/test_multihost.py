"""Two real processes of four devices each, over loopback: the same training, checkpoints and accuracy as one
process with eight."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow  # a minute for the first three, most of it imports and compilation
SETUP = """
import json, os, pathlib, sys
import jax
port, count, index, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])
jax.config.update("jax_numpy_rank_promotion", "raise")
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=index)
assert (jax.process_count(), len(jax.devices())) == (count, 8)
"""
WORK = """
import numpy as np
import tlvit
from tlvit import optim, sharding, state, steps
from tlvit.checkpoints import Checkpoints
from tlvit.data import pipeline, sources
from tlvit.evaluate import evaluate
from tlvit.types import Batch, ScoreMaps

mesh = sharding.make_mesh()
build = lambda: tlvit.create_model("lvvit_s", num_classes=10, image_size=48, patch_size=8, dim=16, depth=1,
                                   num_heads=2, stem_width=4, drop_path=0.5)
make_tx = lambda params: optim.make_optimizer(params, learning_rate=1e-2)
net, tx, train_state = state.init_state(build, make_tx, mesh=mesh, seed=3)
step = steps.make_train_step(net, tx, mesh=mesh, num_classes=10, token_grid=(6, 6), erasing=0.5)
local = sharding.local_batch_size(16, mesh)


def batch(number):
    "This process's part of global batch `number`."
    rng = np.random.RandomState(number)
    whole = Batch(
        image=rng.randint(256, size=(16, 48, 48, 3)).astype(np.uint8),
        label=rng.randint(10, size=16).astype(np.int32),
        mask=np.ones(16, bool),
        maps=ScoreMaps(rng.standard_normal((16, 2, 6, 6)).astype(np.float16),
                       np.broadcast_to(np.arange(2, dtype=np.uint16)[:, None, None], (16, 2, 6, 6))),
        geometry=np.broadcast_to(np.array([[0.8, 0, 0.1], [0, 0.7, 0.2]], np.float32), (16, 2, 3)),
    )
    return jax.tree.map(lambda x: x[index * local : (index + 1) * local], whole)


def train(train_state, numbers):
    losses = []
    for moved in sharding.Prefetch((batch(i) for i in numbers), mesh):
        train_state, metrics = step(train_state, moved)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return train_state, losses


result = {"local": local}
train_state, result["losses"] = train(train_state, range(3))
checkpoints = Checkpoints(folder / "checkpoints")
checkpoints.save(train_state, score=50.0, extra={"saved by": count})
train_state, result["after"] = train(train_state, range(3, 5))
checkpoints.save(train_state)
checkpoints.close()

checkpoints = Checkpoints(folder / "checkpoints")
target = state.init_state(build, make_tx, mesh=mesh, seed=99)[2]
read = checkpoints._metadata


def failing(step):
    "The last process cannot read the last checkpoint."
    if step == 5 and index == count - 1:
        raise OSError("no such disk")
    return read(step)


checkpoints._metadata = failing
again, extra = checkpoints.restore(target)
checkpoints.close()
result["restored"], result["extra"] = int(again.step), extra
again, result["after again"] = train(again, range(3, 5))
weights = {"raw": {"params": again.params, "stats": again.stats}, "ema": again.ema}

source = sources.open_source("digits", "test", data_dir=str(folder.parent / "data"))
batches = lambda: pipeline.eval_batches(source, batch_size=16, image_size=(48, 48), crop_pct=1.0,
                                        process_index=index, process_count=count)
result["own images"] = sum(int(b.mask.sum()) for b in batches())
result["evaluation"] = evaluate(steps.make_eval_step(net, mesh=mesh), weights,
                                sharding.Prefetch(batches(), mesh))
(folder / f"result-{index}.json").write_text(json.dumps(result))
"""
RUN = """
from configs import digits as recipe
from tlvit.training.run_log import start_logging
from tlvit.train import train

config = recipe.get_config("no_token_labels")
config.data.dir = str(folder.parent / "data")
config.model.options = {"patch_size": 8, "dim": 16, "depth": 1, "num_heads": 2, "stem_width": None}
config.batch_size = config.optim.reference_batch = 16
config.epochs, config.log_every = int(sys.argv[5]), 1
start_logging(folder / "run")
result = train(config, folder / "run")
print("RESULT", result.finished, result.step, flush=True)
"""


ANNOTATE = """
import time
from tlvit import annotate
from tlvit.data import sources
from tlvit.checkpoints.model_info import ModelInfo

options = {"widths": (8, 16), "depths": (1, 1), "group_width": 8, "stem_width": 8}
info = ModelInfo("regnety_002", 10, (48, 48), options)
source = sources.open_source("digits", "train", data_dir=str(folder.parent / "data"))
time.sleep(8.0 * index)  # the other process has finished shards by then
made = annotate.annotate(info.build(), info, source, folder / "maps", batch_size=8, top_k=3)
assert (made is None) == (index > 0)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with 32 + 37 scenes in data/; 37 images are no whole number for two processes."""
    from tlvit.data.sources import digit_scenes as digits

    folder = tmp_path_factory.mktemp("shared")
    digits.prepare(folder / "data", num_train=32, num_test=37, num_shards=3)
    return folder


def start(code, count, folder, *arguments):
    """The processes of one job; they share a folder, as machines of a cluster do."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    processes = []
    for index in range(count):
        with (folder / f"out-{index}.txt").open("w") as out:
            command = [sys.executable, "-c", SETUP + code, port, count, index, folder, *arguments]
            processes.append(
                subprocess.Popen(
                    [str(c) for c in command], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
                )
            )
    return processes


def finish(processes, folder, timeout=300):
    """Waits for a job; ends what hangs and shows what it said."""
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end after {timeout} s:\n" + said(folder))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [p.returncode for p in processes] == [0] * len(processes), said(folder)


def said(folder):
    return "\n".join(p.read_text()[-3000:] for p in sorted(folder.glob("out-*.txt")))


def results(folder, count):
    return [json.loads((folder / f"result-{i}.json").read_text()) for i in range(count)]


@pytest.fixture(scope="module")
def one(shared):
    folder = shared / "one"
    finish(start(WORK, 1, folder), folder)
    return results(folder, 1)[0]


@pytest.fixture(scope="module")
def two(shared):
    folder = shared / "two"
    finish(start(WORK, 2, folder), folder)
    return results(folder, 2)


def test_two_processes_train_as_one_does(one, two):
    """Each gives its half of the batch; losses and gradient norms are those of eight devices in one process,
    and the same in both."""
    assert [one["local"], two[0]["local"], two[1]["local"]] == [16, 8, 8]
    assert two[0]["losses"] == two[1]["losses"]
    np.testing.assert_allclose(two[0]["losses"], one["losses"], rtol=2e-5)
    np.testing.assert_allclose(two[0]["after"], one["after"], rtol=1e-3)
    assert len({tuple(x) for x in one["losses"]}) == 3


def test_both_save_and_restore_one_checkpoint(two):
    """What goes on from the checkpoint goes on exactly as what was never stopped."""
    for result in two:
        # Step 5, which one of them could not read, is passed over by both.
        assert (result["restored"], result["extra"]) == (3, {"saved by": 2})
        assert result["after again"] == result["after"]


def test_an_uneven_split_is_counted_once(one, two):
    """37 images: 19 and 18, not 38; the accuracy is that of one process."""
    assert one["own images"] == 37
    assert sorted(r["own images"] for r in two) == [18, 19]
    assert two[0]["evaluation"] == two[1]["evaluation"]
    for name in ("raw", "ema"):
        assert two[0]["evaluation"][name]["count"] == one["evaluation"][name]["count"] == 37
        assert two[0]["evaluation"][name] == pytest.approx(one["evaluation"][name], rel=1e-3)


def test_a_run_of_two_processes(shared):
    """`train` itself: one journal, one log, one config, written by the first process."""
    folder = shared / "run"
    finish(start(RUN, 2, folder, 2), folder)
    for text in (p.read_text() for p in folder.glob("out-*.txt")):
        assert "RESULT True 4" in text
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert lines[-1]["eval/images"] == 37
    assert "8 x cpu (cpu) in 2 processes" in (folder / "out-0.txt").read_text()
    assert "step 1/4" not in (folder / "out-1.txt").read_text()


def test_two_processes_share_the_annotation(shared):
    """Each scores its shards, wherever the other one is; the first describes them all."""
    from tlvit.data.score_maps import reader as score_maps
    from tlvit.data.sources import tfds as sources

    folder = shared / "annotation"
    finish(start(ANNOTATE, 2, folder), folder)
    source = sources.open_source("digits", "train", data_dir=str(shared / "data"))
    info = score_maps.verify(str(folder / "maps"), source)
    assert (info.num_images, info.num_missing, len(info.shards)) == (32, 0, 3)


@pytest.mark.parametrize("victims", [(0, 1), (1,)], ids=["both", "one"])
def test_a_job_that_is_ended_stops_at_one_step_and_saves(victims, shared):
    """SLURM and TPU pods send SIGTERM some time before they kill."""
    folder = shared / f"ended{len(victims)}"
    processes = start(RUN, 2, folder, 4000)
    deadline = time.monotonic() + 120
    while "step 6/" not in (folder / "out-0.txt").read_text():
        assert all(p.poll() is None for p in processes), said(folder)
        assert time.monotonic() < deadline, said(folder)
        time.sleep(0.05)
    for i in victims:
        processes[i].send_signal(signal.SIGTERM)
    finish(processes, folder, timeout=60)
    ends = [re.search(r"RESULT False (\d+)", (folder / f"out-{i}.txt").read_text()) for i in (0, 1)]
    assert ends[0].group(1) == ends[1].group(1)
    assert (folder / "run" / "checkpoints" / ends[0].group(1)).is_dir()
