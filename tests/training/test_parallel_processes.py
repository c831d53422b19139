"""Meshes over two processes of four devices each, over loopback, train like one process with eight."""

import json

import numpy as np
import pytest
from process_jobs import BATCH, finish, results, start

pytestmark = pytest.mark.slow  # half a minute for each job, most of it imports and compilation
MODES = (
    {"data": 2, "fsdp": 4},
    {"data": 1, "fsdp": 8},
    {"data": 1, "model": 8},
    {"data": 1, "fsdp": 2, "model": 4},
)
WORK = (
    BATCH
    + """
modes = sys.argv[5]
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
        own = jax.tree.map(lambda x: x[part * local : (part + 1) * local], whole_batch(seed, 16))
        return to_global(own, mesh)

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
)


def job(folder, count):
    """What every process of a job found for every mesh."""
    finish(start(WORK, count, folder, json.dumps(MODES)), folder, timeout=600)
    return results(folder, count)


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
