"""tlvit's step and the PyTorch step that it is compared with compute the same."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, fill_model

import tlvit
from scripts import benchmark_step, compare_torch
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.torch_names import to_torch
from tlvit.config import Augment, Config, Loss, Optim
from tlvit.models.functional import functionalize
from tlvit.ops.mixing import draw_mixtoken_mask
from tlvit.training.mesh import make_mesh
from tlvit.training.optimizer import make_optimizer
from tlvit.training.prefetch import to_global
from tlvit.training.state import state_from
from tlvit.training.step import make_train_step

torch = pytest.importorskip("torch")

from torch_models.lvvit import LVViT  # noqa: E402
from torch_models.token_labels import TokenLabelLoss, draw_mask, make_step, make_targets  # noqa: E402

CLASSES, SIZE, GRID = 20, 64, (4, 4)


def make_batch(size=6):
    """A batch of the benchmark, with a flip, a rotation and a crop that is mostly outside of the map."""
    options = benchmark_step.parse(
        ["step", f"--batch-size={size}", f"--image-size={SIZE}", f"--num-classes={CLASSES}", "--map-size=9"]
    )
    batch = benchmark_step.make_batch(options)
    geometry = batch.geometry.copy()
    geometry[0] = [[-0.6, 0, 0.9], [0, 0.5, 0.2]]
    geometry[1] = [[0.5, -0.3, 0.4], [0.3, 0.5, 0.1]]
    geometry[2] = [[1, 0, 0.8], [0, 1, 0.9]]
    geometry[3] = [[0.3, 0, 1.6], [0, 0.3, 1.7]]  # nothing of it is covered
    return dataclasses.replace(batch, geometry=geometry)


def tensors(batch):
    arrays = {
        "image": batch.image.transpose(0, 3, 1, 2),
        "value": batch.maps.value,
        "index": batch.maps.index.astype(np.int64),
        "label": batch.label,
        "geometry": batch.geometry,
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(4, 4), (14, 12)])
def test_targets_are_equal(grid):
    batch = make_batch()
    found = tensors(batch)
    del found["image"]
    cls, tokens, weight = make_targets(**found, grid=grid, classes=CLASSES)
    wanted = tlvit.make_targets(batch.maps, batch.label, batch.geometry, grid=grid, num_classes=CLASSES)
    np.testing.assert_allclose(cls, wanted.cls, atol=1e-4)
    np.testing.assert_allclose(tokens, wanted.tokens, atol=1e-4)
    np.testing.assert_allclose(weight, wanted.weight, atol=1e-4)
    assert 0 < np.mean(wanted.weight) < 1


@pytest.mark.slow
def test_boxes_are_those_of_the_paper():
    """The mean area of Beta(1, 1) boxes, of which parts outside of the grid are cut off."""
    rng = np.random.default_rng(0)
    areas = [draw_mask(rng, (14, 14)).mean() for _ in range(2000)]
    keys = jax.random.split(jax.random.key(0), 2000)
    wanted = 1 - jax.vmap(lambda key: draw_mixtoken_mask(key, (14, 14)).lam[0])(keys).mean()
    assert np.mean(areas) == pytest.approx(float(wanted), abs=0.02)


@pytest.mark.slow
def test_losses_of_the_same_steps_are_equal():
    """Three steps from the same weights: mixing, targets, gradients, AdamW and decay."""
    sizes = {"dim": 48, "depth": 2, "num_heads": 4, "stem_width": 16}
    info = ModelInfo("lvvit_s", CLASSES, (SIZE, SIZE))
    config = Config(
        augment=Augment(randaugment="", random_erasing=0.0), loss=Loss(plain_labels=True), optim=Optim(),
        batch_size=6, image_size=(SIZE, SIZE),
    )  # fmt: skip
    model = tlvit.create_model("lvvit_s", num_classes=CLASSES, image_size=SIZE, **sizes)
    fill_model(model)
    reference = LVViT(width=48, depth=2, heads=4, stem=16, residual=2.0, grid=GRID, classes=CLASSES)
    weights = {name: torch.from_numpy(np.array(array)) for name, array in to_torch(model).items()}
    reference.load_state_dict(weights, strict=False)
    loss = TokenLabelLoss(reference.train(), GRID, CLASSES)
    update = make_step(loss, dtype=torch.float32, compiled=False, learning_rate=1e-3)
    net, params, stats = functionalize(model)
    tx = make_optimizer(params, learning_rate=1e-3)
    mesh, batch = make_mesh(jax.devices()[:1]), make_batch()
    train_step, state = make_train_step(net, tx, mesh, config, info), state_from(params, stats, tx)
    state = jax.device_put(state, mesh.devices.flat[0])
    found, wanted = [], []
    for step in range(3):
        key = jax.random.split(jax.random.fold_in(state.key, jnp.int32(step)), 4)[0]
        mask = torch.from_numpy(np.array(draw_mixtoken_mask(key, GRID).mask[0]))
        wanted.append(float(update(tensors(batch), mask)))
        state, metrics = train_step(state, to_global(batch, mesh))
        found.append(float(metrics["loss"]))
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
    assert found[0] - found[2] > 0.1


@pytest.mark.slow
def test_the_command_prints_a_line_and_json():
    command = [
        "--model=lvvit_t", "--batch-size=4", "--depth=1", "--image-size=64", "--steps=1", "--rounds=2",
        "--cores=1", "--torch-compile=off",
    ]  # fmt: skip
    done = run("scripts.compare_torch", *command)
    line, last = done.splitlines()[-2:]
    result = json.loads(last)["results"][0]
    assert line.startswith("lvvit_t  batch 4  tlvit ")
    assert result["ratio"] == pytest.approx(result["torch"]["step_s"] / result["tlvit"]["step_s"])
    of_processor = result["torch"]["processor_s"] / result["tlvit"]["processor_s"]
    assert result["processor_ratio"] == pytest.approx(of_processor)
    assert result["tlvit"]["loss"] > 0
    assert result["tlvit"]["mfu"] is None
    assert json.loads(last)["cores"] == 1


BLOCKED = ("tensorflow", "tensorflow_datasets", "tensorboard", "clu", "ml_collections", "orbax", "matplotlib")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["scripts.compare_torch", "--help"], id="compare_torch --help"),
        pytest.param(
            ["scripts.benchmark", "step", "--model=lvvit_t", "--depth=1", "--image-size=64", "--batch-size=8",
             "--steps=1", "--num-classes=10"],
            id="benchmark step", marks=pytest.mark.slow,
        ),
        pytest.param(
            ["scripts.compare_torch", "--side=tlvit", "--model=lvvit_t", "--depth=1", "--image-size=64",
             "--batch-size=2"],
            id="compare_torch", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_the_scripts_run_without_tensorflow_clu_and_ml_collections(arguments):
    """As on accelerator images with JAX, Flax, optax, einops and torch."""
    code = (
        "import runpy, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {BLOCKED}: raise ModuleNotFoundError(name)\n"
        f"sys.meta_path.insert(0, Absent()); sys.argv = {arguments}\n"
        "runpy.run_module(sys.argv[0], run_name='__main__')"
    )
    run(code=code)


def run(*arguments, code=None):
    """The output of a Python program; its input is empty."""
    command = [sys.executable, *(["-c", code] if code else ["-m", *arguments])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wrong_models_are_refused(capsys):
    with pytest.raises(SystemExit):
        compare_torch.parse(["--model=lvvit_x"])
    assert "lvvit_x is not one of lvvit_t, lvvit_s, lvvit_m" in capsys.readouterr().err
