"""Jobs of one or several processes, over loopback, with eight CPU devices in all.

The programs of the processes are text. They begin with `SETUP` and may use `BATCH`.
"""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from xla_flags import xla_flags

SETUP = """
import json, os, pathlib, sys
import jax
port, count, index, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])
jax.config.update("jax_numpy_rank_promotion", "raise")
if count > 1:
    seconds = int(os.environ["HEARTBEAT"])
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=count, process_id=index,
        heartbeat_timeout_seconds=seconds, shutdown_timeout_seconds=seconds)
assert (jax.process_count(), len(jax.devices())) == (count, 8)
"""
# A global batch of 16 images; the programs have imported NumPy as np, Batch and ScoreMaps.
BATCH = """
def whole_batch(number, side):
    "Global batch `number` of images of side x side pixels."
    rng = np.random.RandomState(number)
    return Batch(
        image=rng.randint(256, size=(16, side, side, 3)).astype(np.uint8),
        label=rng.randint(10, size=16).astype(np.int32),
        mask=np.ones(16, bool),
        maps=ScoreMaps(rng.standard_normal((16, 2, 6, 6)).astype(np.float16),
                       np.broadcast_to(np.arange(2, dtype=np.uint16)[:, None, None], (16, 2, 6, 6))),
        geometry=np.broadcast_to(np.array([[0.8, 0, 0.1], [0, 0.7, 0.2]], np.float32), (16, 2, 3)),
    )
"""


def start(code, count, folder, *arguments, heartbeat=100):
    """Starts the processes of one job, which share a folder. A lost one is missed after `heartbeat` s."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": xla_flags(8 // count),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "HEARTBEAT": str(heartbeat),
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
    """Waits for a job; kills processes that hang and shows their output."""
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running after {timeout} s:\n" + output_of(folder))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [p.returncode for p in processes] == [0] * len(processes), output_of(folder)


def output_of(folder):
    return "\n".join(p.read_text()[-3000:] for p in sorted(folder.glob("out-*.txt")))


def results(folder, count):
    return [json.loads((folder / f"result-{i}.json").read_text()) for i in range(count)]
