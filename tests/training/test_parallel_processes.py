"""Meshes over two processes of four devices each, over loopback, train like one process with eight."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow  # half a minute for each job, most of it imports and compilation
MODES = (
    {"data": 2, "fsdp": 4},
    {"data": 1, "fsdp": 8},
    {"data": 1, "model": 8},
    {"data": 1, "fsdp": 2, "model": 4},
)
WORK = """
import json, pathlib, sys
import jax
port, count, index = map(int, sys.argv[1:4])
folder, modes = pathlib.Path(sys.argv[4]), sys.argv[5]
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=index)
import numpy as np
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import Checkpoints
from tlvit.config import Augment, Config
from tlvit.training.mesh import batch_part, local_batch_size, make_mesh
from tlvit.training.optimizer import make_optimizer
from tlvit.training.prefetch import to_global
from tlvit.training.state import abstract_model, abstract_state, init_state
from tlvit.training.step import make_train_step
from tlvit.types import Batch, ScoreMaps

options = {"patch_size": 8, "dim": 32, "depth": 1, "num_heads": 8, "token_head": True}
info = ModelInfo("vit", 10, (16, 16), options)
net, params, _ = abstract_model(info.build)
tx = make_optimizer(params, learning_rate=1e-2)
config = Config(augment=Augment(randaugment="", random_erasing=0.0))
result = []
for number, sizes in enumerate(json.loads(modes)):
    mesh = make_mesh(**sizes)
    part, parts = batch_part(mesh)
    local = local_batch_size(16, mesh)

    def batch(seed):
        rng = np.random.RandomState(seed)
        whole = Batch(
            image=rng.randint(256, size=(16, 16, 16, 3)).astype(np.uint8),
            label=rng.randint(10, size=16).astype(np.int32),
            mask=np.ones(16, bool),
            maps=ScoreMaps(rng.standard_normal((16, 2, 6, 6)).astype(np.float16),
                           np.broadcast_to(np.arange(2, dtype=np.uint16)[:, None, None], (16, 2, 6, 6))),
            geometry=np.broadcast_to(np.array([[0.8, 0, 0.1], [0, 0.7, 0.2]], np.float32), (16, 2, 3)),
        )
        return to_global(jax.tree.map(lambda x: x[part * local : (part + 1) * local], whole), mesh)

    step = make_train_step(net, tx, mesh, config, info, mix_shards=8)
    state = init_state(info.build, tx, mesh=mesh, seed=3)
    losses = []
    for seed in range(3):
        state, metrics = step(state, batch(seed))
        losses.append(float(metrics["loss"]))
        if seed == 0:
            with Checkpoints(folder / str(number)) as checkpoints:
                checkpoints.save(state)
    with Checkpoints(folder / str(number)) as checkpoints:
        state, _ = checkpoints.restore(abstract_state(info.build, tx, mesh=mesh))
    again = []
    for seed in (1, 2):
        state, metrics = step(state, batch(seed))
        again.append(float(metrics["loss"]))
    result.append({"local": local, "losses": losses, "again": again})
(folder / f"result-{index}.json").write_text(json.dumps(result))
"""


def job(folder, count):
    """What every process of a job found for every mesh."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", WORK, str(port), str(count)]
    outs = [(folder / f"out-{i}.txt").open("w") for i in range(count)]
    processes = [
        subprocess.Popen(
            [*command, str(i), str(folder), json.dumps(MODES)],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        for i, out in enumerate(outs)
    ]
    try:
        codes = [process.wait(600) for process in processes]
    finally:
        for process, out in zip(processes, outs, strict=True):
            process.kill()
            process.wait()
            out.close()
    assert codes == [0] * count, "\n".join(p.read_text()[-3000:] for p in sorted(folder.glob("out-*")))
    return [json.loads((folder / f"result-{i}.json").read_text()) for i in range(count)]


def test_two_processes_train_like_one(tmp_path):
    """Processes that share a model provide the same images; a restored run continues bit for bit."""
    [one] = job(tmp_path / "one", 1)
    first, second = job(tmp_path / "two", 2)
    assert [mode["local"] for mode in first] == [8, 8, 16, 8]
    for alone, ours, theirs in zip(one, first, second, strict=True):
        assert ours == theirs
        np.testing.assert_allclose(ours["losses"], alone["losses"], atol=1e-5)
        assert ours["again"] == ours["losses"][1:]
    np.testing.assert_allclose([mode["losses"] for mode in one], [one[0]["losses"]] * len(MODES), atol=1e-5)
