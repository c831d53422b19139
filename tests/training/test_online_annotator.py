"""The annotator inside the training step: what it sees, what its labels are, and every mesh."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tlvit
from configs import digits as recipe
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.native import save_model_folder
from tlvit.config import Augment, Config, Data, Ema, Loss, Optim, resolve
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize
from tlvit.ops.resize import resize_pixels
from tlvit.training.annotation import annotate
from tlvit.training.device_scorer import Annotator
from tlvit.training.loop import train
from tlvit.training.mesh import make_mesh, state_shardings
from tlvit.training.online_annotator import online_logits
from tlvit.training.prefetch import to_global
from tlvit.training.state import state_from
from tlvit.training.step import Teacher, make_train_step
from tlvit.types import Batch, ScoreMaps

CLASSES, SIZE = 6, 32
INFO = ModelInfo("lvvit_s", CLASSES, (SIZE, SIZE))
CONVNET = {"widths": (8, 16), "depths": (1, 1), "strides": (2, 2), "group_width": 8, "stem_width": 8}
VIT = {"dim": 32, "depth": 1, "num_heads": 4, "stem_width": 8}
OWN = Preprocessing(mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
ANNOTATORS = {
    "convnet": ModelInfo("regnety_002", CLASSES, (48, 40), CONVNET, preprocessing=OWN),
    "vit": ModelInfo("lvvit_s", CLASSES, (SIZE, SIZE), VIT),
}
IDENTITY = np.eye(2, 3, dtype=np.float32)


def make_batch(seed=0, size=16, maps=None):
    rng = np.random.RandomState(seed)
    return Batch(
        image=rng.randint(256, size=(size, SIZE, SIZE, 3)).astype(np.uint8),
        label=rng.randint(CLASSES, size=size).astype(np.int32),
        mask=np.ones(size, bool),
        maps=maps,
        geometry=np.broadcast_to(IDENTITY, (size, 2, 3)),
    )


def sharp(model):
    """The model with a classifier whose logits differ by several units, as those of a trained one do."""
    head = model.aux_head if hasattr(model, "aux_head") else model.head.fc
    head.kernel[...] = 60 * head.kernel[...]
    return model


def teacher_of(kind, mesh):
    net, params, stats = functionalize(sharp(ANNOTATORS[kind].build(seed=2)))
    arrays = jax.device_put((params, stats), state_shardings((params, stats), mesh))
    return Teacher(net, *arrays, info=ANNOTATORS[kind])


def test_the_annotator_gets_its_own_size_and_normalization():
    """A stand-in returns its input, times its parameters, as logits."""
    model = lambda params, stats: types.SimpleNamespace(dense_logits=lambda x: params * x + stats)
    images, info = make_batch(size=8).image, ANNOTATORS["convnet"]
    expected = 2 * normalize(resize_pixels(images, (48, 40)), OWN.mean, OWN.std) + 1
    for mesh in (make_mesh(jax.devices()[:1]), make_mesh(data=2, model=4), make_mesh(data=1, model=3)):
        arrays = (np.full((1, 1, 1, 3), 2, np.float32), np.ones((1, 1, 1, 3), np.float32))
        run = functools.partial(online_logits, types.SimpleNamespace(bind=model), info, mesh=mesh)
        np.testing.assert_allclose(jax.jit(run)(arrays, images), expected, atol=1e-5)


def step_of(mesh, teacher, config, tx=None):
    """The step of a student and its state on a mesh."""
    tx = tx or optax.sgd(0.1)
    options = {"num_classes": CLASSES, "image_size": SIZE, **VIT}
    net, params, stats = functionalize(tlvit.create_model("lvvit_s", seed=1, **options))
    state = state_from(params, stats, tx, seed=3, ema=False)
    state = jax.device_put(state, state_shardings(state, mesh))
    return make_train_step(net, tx, mesh, config, INFO, teacher=teacher, mix_shards=8), state


def settings(erasing=0.0, **options):
    return Config(
        data=Data(annotator="a"),
        augment=Augment(randaugment="", random_erasing=erasing),
        loss=Loss(plain_labels=True, mixtoken=options.pop("mixtoken", True)),
        ema=Ema(decay=0),
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("erasing", [0.0, 1.0])
def test_a_step_equals_one_with_the_stored_maps_of_its_images(erasing):
    """All classes are stored. MixToken and random erasing change what the student sees, not the labels."""
    mesh, batch = make_mesh(jax.devices()[:1]), make_batch()
    teacher = teacher_of("convnet", mesh)
    arrays = (teacher.params, teacher.stats)
    logits = online_logits(teacher.net, teacher.info, arrays, batch.image, mesh)
    value = np.moveaxis(np.asarray(logits), -1, 1).astype(np.float16)
    index = np.broadcast_to(np.arange(CLASSES, dtype=np.uint16).reshape(1, CLASSES, 1, 1), value.shape)
    stored = dataclasses.replace(batch, maps=ScoreMaps(value, index))
    found = []
    for model, images in ((teacher, batch), (None, stored)):
        step, state = step_of(mesh, model, settings(erasing))
        state, metrics = step(state, to_global(images, mesh))
        found.append((float(metrics["loss"]), float(metrics["grad_norm"]), state.params))
    np.testing.assert_allclose(found[0][:2], found[1][:2], atol=1e-3)
    for a, b in zip(*(jax.tree.leaves(params) for *_, params in found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "data x model": {"data": 4, "model": 2},
    "data x fsdp x model": {"data": 2, "fsdp": 2, "model": 2},
}


def losses_on(kind, mesh, config):
    """Losses and gradient norms of three steps."""
    step, state = step_of(mesh, teacher_of(kind, mesh), config)
    found = []
    for seed in range(3):
        with jax.transfer_guard("allow"):
            batch = to_global(make_batch(seed), mesh)
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, batch)
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ANNOTATORS)
def test_every_mesh_trains_like_one_device(kind):
    config = settings(erasing=0.5)
    expected = losses_on(kind, make_mesh(jax.devices()[:1]), config)
    for name, sizes in MESHES.items():
        found = losses_on(kind, make_mesh(**sizes), config)
        np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_accumulation_scores_every_part():
    """BatchNorm of the student's stem makes parts differ a little from the whole batch."""
    mesh = make_mesh(jax.devices()[:1])
    whole = losses_on("convnet", mesh, settings(mixtoken=False))
    parts = losses_on("convnet", mesh, settings(mixtoken=False, optim=Optim(accumulate=2)))
    np.testing.assert_allclose(parts[:, 0], whole[:, 0], rtol=0.05)


@pytest.mark.slow
def test_devices_exchange_no_images_and_nothing_is_differentiated():
    """With data parallelism the collectives are those of gradients; the annotator is not in the gradient."""
    mesh = make_mesh()
    teacher = teacher_of("convnet", mesh)
    step, state = step_of(mesh, teacher, settings())
    batch = make_batch()
    text = step.func.lower(state, to_global(batch, mesh), **step.keywords).compile().as_text()
    assert "all-reduce" in text
    assert [k for k in ("all-to-all", "collective-permute", "all-gather") if k in text] == []

    def total(arrays, images):
        return jnp.sum(online_logits(teacher.net, teacher.info, arrays, images, make_mesh(jax.devices()[:1])))

    arrays = jax.tree.map(np.asarray, (teacher.params, teacher.stats))
    grads = jax.grad(total)(arrays, batch.image.astype(jnp.float32))
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) == 0


# Runs


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Digits, an annotator of them (not trained), and its score maps with all classes."""
    from tlvit.data.sources import digit_scenes
    from tlvit.data.sources.open import open_source

    folder = tmp_path_factory.mktemp("online")
    digit_scenes.prepare(folder / "data", num_train=32, num_test=16, num_shards=2)
    info = ModelInfo("regnety_002", 10, (48, 48), CONVNET, preprocessing=OWN)
    model = sharp(info.build(seed=2))
    save_model_folder(folder / "annotator", model, info)
    source = open_source("digits", "train", data_dir=str(folder / "data"))
    annotate(Annotator(model, info), source, folder / "maps", top_k=10, batch_size=16)
    return folder


def run_config(scene, *, whole=False, **changes):
    """Four steps of a small student; `whole`: on whole images."""
    config = recipe.get_config("token_labels")
    config.data.dir = str(scene / "data")
    config.model.options = {"patch_size": 8, "dim": 32, "depth": 1, "num_heads": 2, "skip_lam": 1.0}
    config.batch_size = config.optim.base_batch_size = 16
    config.epochs = 2
    config.log_every = 1
    config.optim.warmup_epochs = 0.0
    config.eval.every_epochs = 0
    config.checkpoint.every_epochs = 1
    if whole:
        config.augment.crop_scale = config.augment.crop_ratio = (1.0, 1.0)
    config.update_from_flattened_dict(changes)
    return resolve(config)


def losses_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.slow
def test_a_run_equals_one_with_stored_maps_and_resumes(scene, tmp_path, caplog):
    """Without augmentation, to 1e-3. A run that is resumed repeats the losses bit for bit."""
    online = {"data.annotator": str(scene / "annotator")}
    train(run_config(scene, whole=True, **{"data.score_maps": str(scene / "maps")}), tmp_path / "stored")
    with caplog.at_level("INFO", "tlvit"):
        train(run_config(scene, whole=True, **online), tmp_path / "online")
    assert (
        f"ON: regnety_002 from {scene / 'annotator'} scores the augmented images in every step, at 48x48, "
        "all 10 classes, 0.000337 G MACs an image; class token learns the annotator target"
    ) in caplog.text
    stored, found = losses_of(tmp_path / "stored"), losses_of(tmp_path / "online")
    assert len(found) == 4
    np.testing.assert_allclose(found, stored, atol=1e-3)
    augmented = {**online, "augment.randaugment": "rand-m9-n2-mstd0.5-inc1", "augment.random_erasing": 0.25}
    train(run_config(scene, **augmented), tmp_path / "once")
    shutil.copytree(tmp_path / "once", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train(run_config(scene, **augmented), tmp_path / "again")
    assert losses_of(tmp_path / "again") == losses_of(tmp_path / "once")


@pytest.mark.slow
def test_annotators_that_do_not_fit_are_refused(scene, tmp_path):
    seven = ModelInfo("regnety_002", 7, (48, 48), CONVNET)
    save_model_folder(tmp_path / "seven", seven.build(), seven)
    head = {"out_indices": (0, 0, 0, 0), "head": "fcn", "channels": 8}
    plain = ModelInfo("upernet_lvvit_s", 10, (64, 64), {**VIT, **head})
    save_model_folder(tmp_path / "plain", plain.build(), plain)
    for name, message in (
        ("seven", "The annotator .*seven has 7 classes, but the data have 10"),
        ("plain", "plain is a upernet_lvvit_s without dense logits, so it cannot score"),
    ):
        with pytest.raises(ValueError, match=message):
            train(run_config(scene, **{"data.annotator": str(tmp_path / name)}), tmp_path / "w")
    with pytest.raises(FileNotFoundError, match="none"):
        train(run_config(scene, **{"data.annotator": str(tmp_path / "none")}), tmp_path / "w")
