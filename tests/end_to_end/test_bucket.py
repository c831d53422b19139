"""Data, score maps and workdir in a gs:// bucket: annotate, train, resume, evaluate.

The bucket is a service on this machine (`fake_gcs`), whose address is in the environment of the commands.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from fake_gcs import FakeGcs

pytestmark = pytest.mark.slow  # a minute

COMMANDS = """
import tensorflow as tf
from tlvit.__main__ import main

def run(*arguments):
    assert main(list(arguments)) == 0, arguments

data, maps, workdir = "gs://bucket/data", "gs://bucket/maps", "gs://bucket/run"
run("annotate", "--checkpoint=annotator", "--data=digits", f"--data-dir={data}", f"--out={maps}", "--top-k=3")
options = {"patch_size": 8, "dim": 16, "depth": 1, "num_heads": 2, "stem_width": None}
student = [
    "--config=digits", f"--workdir={workdir}", f"--config.data.dir={data}",
    f"--config.data.score_maps={maps}",
    "--config.batch_size=16", "--config.optim.base_batch_size=16", "--config.optim.warmup_epochs=1.0",
    "--config.checkpoint.every_epochs=1", "--config.checkpoint.keep=1", "--config.log_every=1",
    "--config.eval.every_epochs=3", *(f"--config.model.options.{k}={v}" for k, v in options.items()),
]
run("train", *student, "--config.epochs=2")
run("train", *student, "--config.epochs=3")
# A run that was killed while it wrote its last checkpoint goes on from the one before.
for folder in ("", "state/", "metrics/"):
    tf.io.gfile.remove(f"{workdir}/checkpoints/12/{folder}commit_success.txt")
run("train", *student, "--config.epochs=3")
run("eval", *student, "--config.epochs=3")
"""


@pytest.fixture
def gcs(tmp_path):
    """A service whose bucket has a digits set of 64 + 40 scenes in data/."""
    from tlvit.data.sources import digit_scenes as digits

    digits.prepare(tmp_path / "data", num_train=64, num_test=40, num_shards=4)
    service = FakeGcs(tmp_path)
    service.put_folder(tmp_path / "data", "bucket/data")
    yield service
    service.close()


def test_a_run_whose_files_are_in_a_bucket(gcs, tmp_path):
    from tlvit.checkpoints.model_info import ModelInfo
    from tlvit.checkpoints.native import save_model_folder

    options = {"widths": (8, 16), "depths": (1, 1), "group_width": 8, "stem_width": 8}
    info = ModelInfo("regnety_002", 10, (48, 48), options)
    cwd = tmp_path / "cwd"
    save_model_folder(cwd / "annotator", info.build(), info)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        cwd=cwd,
        env={**os.environ, **gcs.environment, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("resumed at step 8") == 2, done.stdout
    assert [path.name for path in cwd.iterdir()] == ["annotator"]  # no local folder gs:/
    names = gcs.names("bucket/run/")
    assert {"config.json", "classes.txt", "metrics.jsonl", "report.png"} <= set(names)
    assert [name for name in names if name.startswith("events.out.tfevents")]
    assert "checkpoints/12/commit_success.txt" in names
    assert not [name for name in names if name.startswith("checkpoints/4/")]  # deleted, as keep=1
    metrics = [json.loads(line) for line in gcs.objects["bucket/run/metrics.jsonl"][0].splitlines()]
    steps = [line["step"] for line in metrics if "train/loss" in line]
    assert steps == list(range(1, 13))
    assert np.isfinite([line["train/loss"] for line in metrics if "train/loss" in line]).all()
    assert [line["step"] for line in metrics if "eval/raw_top1" in line] == [8, 12]
    assert json.loads(done.stdout.splitlines()[-1])["raw"]["count"] == 40
