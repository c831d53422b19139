"""The commands of tlvit on a tiny digits set: their arguments, ways to call them, and what a run leaves."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
from tiny_images import photographs
from xla_flags import xla_flags

ROOT = pathlib.Path(__file__).parent.parent
TINY = [
    "--config.mesh.data=1",
    "--config.batch_size=16",
    "--config.optim.base_batch_size=16",
    "--config.epochs=4",
    "--config.optim.warmup_epochs=1.0",
    "--config.eval.every_epochs=2",
    "--config.checkpoint.every_epochs=1",
    "--config.log_every=2",
]
ANNOTATOR = [
    "--config.model.options.widths=(16,32)",
    "--config.model.options.depths=(1,1)",
    "--config.model.options.strides=(2,1)",
    "--config.model.options.group_width=16",
]
STUDENT = ["--config.model.options.depth=1", "--config.model.options.dim=48"]
STEPS = 16  # of the student's run: four epochs of four


def command(module, *arguments, devices=1):
    """[argv, environment] of a program of the checkout, quiet and small."""
    environment = {
        **os.environ,
        "XLA_FLAGS": xla_flags(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    return {"args": [sys.executable, "-m", module, *map(str, arguments)], "cwd": ROOT, "env": environment}


def run(module, *arguments, devices=1, status=0):
    """Runs a program to its end; its output, both streams."""
    done = subprocess.run(
        **command(module, *arguments, devices=devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def call(capfd, module, *arguments, status=0):
    """Runs a command in this process; what it prints, errors and messages first."""
    capfd.readouterr()
    returned = importlib.import_module(module).main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    printed = err + out
    assert returned == status, printed
    return printed


def build_scene(folder):
    """Makes a folder with what the commands read and write.

    data/         64 training and 40 test images of digits, as a TFDS data set of 4 shards
    annotator/    workdir of a trained annotator
    maps/         its score maps of the training images
    student/      workdir of a student, trained by one device without interruption
    student.txt   what it printed
    images/       train/ and val/ with two classes of photographs
    photo.jpg     a photograph
    """
    from tlvit import main
    from tlvit.data.sources import digit_scenes as digits

    folder.mkdir()
    data, annotator, maps = folder / "data", folder / "annotator", folder / "maps"
    digits.prepare(data, num_train=64, num_test=40, num_shards=4)
    assert main.main(annotator_command(data, annotator)) == 0
    annotate = importlib.import_module("tlvit.annotate")  # tlvit.annotate is a function
    assert annotate.main(annotate_command(data, annotator, maps)) == 0
    text = run("tlvit.main", *student_command(folder, folder / "student"))
    (folder / "student.txt").write_text(text)
    for split, count in (("train", 8), ("val", 2)):
        for name, image in zip(("china", "flower"), photographs(), strict=False):
            for number in range(count):
                path = folder / "images" / split / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[number:]).save(path)
    Image.fromarray(photographs()[0]).save(folder / "photo.jpg")


def annotator_command(scenes, workdir):
    """Trains a small annotator for four epochs of four steps."""
    return [
        "--config=digits:annotator",
        f"--workdir={workdir}",
        f"--config.data.dir={scenes}",
        *TINY,
        *ANNOTATOR,
    ]


def annotate_command(scenes, annotator, maps):
    """Writes score maps of the training scenes."""
    return [
        f"--checkpoint={annotator}", "--data=digits", f"--data-dir={scenes}", "--top-k=5", f"--out={maps}",
    ]  # fmt: skip


def student_command(scene, workdir, *more):
    """Trains a student with token labels for STEPS steps."""
    return [
        "--config=digits", f"--workdir={workdir}", f"--config.data.dir={scene}/data",
        f"--config.data.score_maps={scene}/maps", *TINY, *STUDENT, *more,
    ]  # fmt: skip


def last_state(workdir):
    """The step and the arrays, by name, of the last checkpoint."""
    import orbax.checkpoint as ocp

    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    folder = workdir / "checkpoints" / str(max(steps)) / "state"
    with ocp.StandardCheckpointer() as reader:
        return max(steps), {k: np.asarray(v) for k, v in reader.restore(folder).items()}


def check_equal_states(found, expected):
    """Compares the last checkpoints of two workdirs bit for bit."""
    (step, state), (wanted_step, wanted) = last_state(found), last_state(expected)
    assert step == wanted_step
    assert state.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)


def check_equal_losses(found, expected):
    """Checks that metrics.jsonl of two workdirs counts every step once, with the same loss.

    A line has the mean loss of the steps since the line before. A run that stops writes one more line, so the
    sums up to the steps that both have are compared.
    """
    sums, wanted = _loss_sums(found), _loss_sums(expected)
    assert sums.keys() >= wanted.keys()
    for step, total in wanted.items():
        np.testing.assert_allclose(sums[step], total, rtol=1e-6, err_msg=f"up to step {step}")


def _loss_sums(workdir):
    """Step -> sum of the losses up to this step."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    sums, before, total = {}, 0, 0.0
    for line in lines:
        if "train/loss" in line:
            assert line["step"] > before
            total += line["train/loss"] * (line["step"] - before)
            sums[line["step"]], before = total, line["step"]
    return sums
