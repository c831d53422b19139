"""Two processes of four devices each, over loopback: the same training, checkpoints and accuracy as one
process with eight."""

import json
import re
import signal
import time

import numpy as np
import pytest
from process_jobs import BATCH, finish, output_of, results, start

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import save_model_folder

pytestmark = pytest.mark.slow  # a minute for the first three, most of it imports and compilation
WORK = (
    BATCH
    + """
import numpy as np
import tlvit
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.native import Checkpoints
from tlvit.config import Augment, Config
from tlvit.data.pipeline import eval_batches
from tlvit.data.sources.open import open_source
from tlvit.training.evaluation import evaluate
from tlvit.training.mesh import local_batch_size, make_mesh
from tlvit.training.optimizer import make_optimizer
from tlvit.training.prefetch import Prefetch
from tlvit.training.state import abstract_model, init_state
from tlvit.training.step import make_eval_step, make_train_step
from tlvit.types import Batch, ScoreMaps

mesh = make_mesh()
options = {"patch_size": 8, "dim": 16, "depth": 1, "num_heads": 2, "stem_width": 4, "drop_path": 0.5}
info = ModelInfo("lvvit_s", 10, (48, 48), options, preprocessing=Preprocessing(crop_pct=1.0))
net, params, _ = abstract_model(info.build)
tx = make_optimizer(params, learning_rate=1e-2)
train_state = init_state(info.build, tx, mesh=mesh, seed=3)
config = Config(augment=Augment(randaugment="", random_erasing=0.5))
step = make_train_step(net, tx, mesh, config, info)
local = local_batch_size(16, mesh)


def batch(number):
    "This process's part of global batch `number`."
    return jax.tree.map(lambda x: x[index * local : (index + 1) * local], whole_batch(number, 48))


def train(train_state, numbers):
    losses = []
    for moved in Prefetch((batch(i) for i in numbers), mesh):
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
target = init_state(info.build, tx, mesh=mesh, seed=99)
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

source = open_source("digits", "test", data_dir=str(folder.parent / "data"))
batches = lambda: eval_batches(source, info, batch_size=16, process_index=index, process_count=count)
result["own images"] = sum(int(b.mask.sum()) for b in batches())
eval_step = make_eval_step(net, mesh, info.preprocessing)
result["evaluation"] = evaluate(eval_step, weights, Prefetch(batches(), mesh))
(folder / f"result-{index}.json").write_text(json.dumps(result))
"""
)
RUN = """
from configs import digits as recipe
from tlvit.config import resolve
from tlvit.training.loop import train
from tlvit.training.run_log import start_logging

config = recipe.get_config("no_token_labels")
config.data.dir = str(folder.parent / "data")
config.model.options = {"patch_size": 8, "dim": 16, "depth": 1, "num_heads": 2, "stem_width": None}
config.batch_size = config.optim.base_batch_size = 16
config.epochs, config.log_every = int(sys.argv[5]), 1
start_logging(folder / "run")
result = train(resolve(config), folder / "run")
print("RESULT", result.finished, result.step, flush=True)
"""

FROM_WEIGHTS = (
    RUN.replace("result = train", 'config.model.init_from = str(folder.parent / "weights")\nresult = train')
    + """
from tlvit.training.evaluation import evaluate_checkpoint

values = evaluate_checkpoint(folder.parent / "weights", resolve(config))
if index == 0:
    (folder / "values.json").write_text(json.dumps(values))
"""
)


ANNOTATE = """
import time
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.data.sources.open import open_source
from tlvit.training.annotation import annotate
from tlvit.training.device_scorer import Annotator

options = {"widths": (8, 16), "depths": (1, 1), "group_width": 8, "stem_width": 8}
info = ModelInfo("regnety_002", 10, (48, 48), options)
source = open_source("digits", "train", data_dir=str(folder.parent / "data"))
time.sleep(8.0 * index)  # the other process has finished shards by then
made = annotate(Annotator(info.build(), info), source, folder / "maps", batch_size=8, top_k=3)
assert (made is None) == (index > 0)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with 32 + 37 scenes in data/; two processes do not divide 37 images."""
    from tlvit.data.sources import digit_scenes as digits

    folder = tmp_path_factory.mktemp("shared")
    digits.prepare(folder / "data", num_train=32, num_test=37, num_shards=3)
    return folder


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


def test_two_processes_train_like_one(one, two):
    """Each provides half of the batch; losses and gradient norms equal those of one process."""
    assert [one["local"], two[0]["local"], two[1]["local"]] == [16, 8, 8]
    assert two[0]["losses"] == two[1]["losses"]
    np.testing.assert_allclose(two[0]["losses"], one["losses"], rtol=2e-5)
    np.testing.assert_allclose(two[0]["after"], one["after"], rtol=1e-3)
    assert len({tuple(x) for x in one["losses"]}) == 3


def test_both_save_and_restore_one_checkpoint(two):
    """The resumed run equals the uninterrupted one."""
    for result in two:
        # Both skip step 5, which one of them could not read.
        assert (result["restored"], result["extra"]) == (3, {"saved by": 2})
        assert result["after again"] == result["after"]


def test_an_uneven_split_is_counted_once(one, two):
    """37 images: 19 and 18, not 38. The accuracy equals that of one process."""
    assert one["own images"] == 37
    assert sorted(r["own images"] for r in two) == [18, 19]
    assert two[0]["evaluation"] == two[1]["evaluation"]
    for name in ("raw", "ema"):
        assert two[0]["evaluation"][name]["count"] == one["evaluation"][name]["count"] == 37
        assert two[0]["evaluation"][name] == pytest.approx(one["evaluation"][name], rel=1e-3)


def test_a_run_of_two_processes(shared):
    """The first process writes metrics.jsonl, the log and config.json."""
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
    """Each scores its own shards; the first writes the description."""
    from tlvit.data.score_maps.verification import verify
    from tlvit.data.sources.open import open_source

    folder = shared / "annotation"
    finish(start(ANNOTATE, 2, folder), folder)
    source = open_source("digits", "train", data_dir=str(shared / "data"))
    info = verify(str(folder / "maps"), source)
    assert (info.num_images, info.num_missing, len(info.shards)) == (32, 0, 3)


def wait_for_step(step, processes, folder, timeout=300):
    """Waits until the first process has printed a step."""
    deadline = time.monotonic() + timeout
    while f"step {step}/" not in (folder / "out-0.txt").read_text():
        assert all(p.poll() is None for p in processes), output_of(folder)
        assert time.monotonic() < deadline, output_of(folder)
        time.sleep(0.05)


@pytest.mark.parametrize("victims", [(0, 1), (1,)], ids=["both", "one"])
def test_a_terminated_job_stops_at_one_step_and_saves(victims, shared):
    """SLURM and TPU pods send SIGTERM before SIGKILL."""
    folder = shared / f"ended{len(victims)}"
    processes = start(RUN, 2, folder, 4000)
    wait_for_step(6, processes, folder)
    for i in victims:
        processes[i].send_signal(signal.SIGTERM)
    finish(processes, folder)
    ends = [re.search(r"RESULT False (\d+)", (folder / f"out-{i}.txt").read_text()) for i in (0, 1)]
    assert ends[0].group(1) == ends[1].group(1)
    assert (folder / "run" / "checkpoints" / ends[0].group(1)).is_dir()


def test_when_a_process_is_lost_the_other_one_ends_and_names_it(shared):
    folder = shared / "lost"
    processes = start(RUN, 2, folder, 4000, heartbeat=10)
    wait_for_step(6, processes, folder)
    processes[1].kill()
    try:
        assert processes[0].wait(300) != 0
    finally:
        processes[0].kill()
    assert re.search(r"tasks are unhealthy \(stopped sending heartbeats\):\n1\n", output_of(folder))


def test_processes_start_from_weights_and_evaluate_them_as_one_process_does(shared):
    options = {"patch_size": 8, "dim": 16, "depth": 1, "num_heads": 2, "stem_width": None}
    info = ModelInfo("lvvit_s", 10, (48, 48), options)
    save_model_folder(shared / "weights", info.build(seed=7), info)
    found = []
    for count, name in ((1, "weights one"), (2, "weights two")):
        folder = shared / name
        finish(start(FROM_WEIGHTS, count, folder, "1"), folder)
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        found.append([*losses, *json.loads((folder / "values.json").read_text()).values()])
    assert len(found[0]) > 3
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
