"""Every mesh trains like one device: parameters split over `fsdp`, heads and channels over `model`."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

import tlvit
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.native import Checkpoints
from tlvit.config import Augment, Config, Distill, Ema, Loss, Optim
from tlvit.models.functional import functionalize
from tlvit.training.mesh import make_mesh, state_bytes, state_shardings
from tlvit.training.optimizer import make_optimizer
from tlvit.training.prefetch import to_global
from tlvit.training.state import abstract_model, abstract_state, init_state, state_from
from tlvit.training.step import Teacher, make_eval_step, make_train_step
from tlvit.types import Batch, ScoreMaps

CLASSES, SIZE = 6, 32
INFO = ModelInfo("lvvit_s", CLASSES, (SIZE, SIZE))
COMMON = {"dim": 32, "depth": 1, "num_heads": 4, "image_size": SIZE, "num_classes": CLASSES}
FAMILIES = {
    "vit": ("vit", {**COMMON, "token_head": True}),
    "lvvit": ("lvvit_s", {**COMMON, "stem_width": 8, "drop_path": 0.5}),
    "lvvit_remat": ("lvvit_s", {**COMMON, "stem_width": 8, "drop_path": 0.5, "remat": True}),
    "lvvit_fused": ("lvvit_s", {**COMMON, "stem_width": 8, "drop_path": 0.5, "attention": "fused"}),
    "lvvit_scan": ("lvvit_s", {**COMMON, "depth": 2, "stem_width": 8, "drop_path": 0.5, "scan_blocks": True}),
    "t2t": ("t2t_vit_7", {**COMMON, "token_head": True, "drop_path": 0.5}),
    "t2t_se": ("t2t_vit_14_se", {**COMMON, "token_head": True}),
    "t2t_ghost": ("t2t_vit_16_ghost", {**COMMON, "token_head": True}),
    "t2t_dense": ("t2t_vit_dense", {**COMMON, "depth": (1, 1), "growth": 16, "token_head": True}),
    "deit": ("deit_tiny_patch16_224", {**COMMON, "token_head": True, "drop_path": 0.5}),
    "deit3": ("deit_small_patch16_LS", {**COMMON, "token_head": True, "drop_path": 0.5}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", COMMON),
}
MODES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "model": {"data": 1, "model": 4},
    "data x fsdp": {"data": 2, "fsdp": 4},
    "data x model": {"data": 4, "model": 2},
    "fsdp x model": {"data": 1, "fsdp": 4, "model": 2},
    "data x fsdp x model": {"data": 2, "fsdp": 2, "model": 2},
}
CONFIG = Config(
    augment=Augment(randaugment="", random_erasing=0.25), ema=Ema(decay=0.9), loss=Loss(plain_labels=True)
)
CONFIGS = {
    "MixToken": CONFIG,
    "quick": dataclasses.replace(CONFIG, augment=Augment(randaugment="", random_erasing=0.0)),
    # Part p of two has images p, p + 2, …; of 16 images, one of 8 devices then has a single one.
    "accumulate": dataclasses.replace(
        CONFIG, optim=Optim(accumulate=2), loss=Loss(plain_labels=True, mixtoken=False)
    ),
    "teacher": dataclasses.replace(
        CONFIG,
        token_labels=False,
        augment=Augment(randaugment="", random_erasing=0.0, mixup=0.8, cutmix=1.0),
        distill=Distill(teacher="teacher"),
    ),
}


def make_batch(seed, size=16):
    rng = np.random.RandomState(seed)
    index = np.argsort(rng.rand(size, CLASSES, 4, 4), axis=1)[:, :2].astype(np.uint16)
    identity = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    return Batch(
        image=rng.randint(256, size=(size, SIZE, SIZE, 3)).astype(np.uint8),
        label=rng.randint(CLASSES, size=size).astype(np.int32),
        mask=np.ones(size, bool),
        maps=ScoreMaps((3 * rng.standard_normal(index.shape)).astype(np.float16), index),
        geometry=np.broadcast_to(identity, (size, 2, 3)),
    )


def model(family):
    name, options = FAMILIES[family]
    return tlvit.create_model(name, **options)


@functools.cache
def parts(family):
    """(net, optimizer, host's copy of parameters and statistics)."""
    net, params, stats = functionalize(model(family))
    return (
        net,
        make_optimizer(params, learning_rate=3e-3, clip_norm=5.0),
        jax.tree.map(np.asarray, (params, stats)),
    )


class Run:
    """A state on a mesh and its step; every call trains one step and gives loss and gradient norm."""

    def __init__(self, family, sizes, kind="MixToken"):
        self.mesh = make_mesh(None if sizes else jax.devices()[:1], **sizes)
        self.net, self.tx, arrays = parts(family)
        state = state_from(*arrays, self.tx, seed=3)
        self.shardings = state_shardings(state, self.mesh)
        self.state = jax.device_put(state, self.shardings)
        options = {"teacher": teacher_on(self.mesh) if kind == "teacher" else None, "mix_shards": 8}
        self.step = make_train_step(self.net, self.tx, self.mesh, CONFIGS[kind], INFO, **options)

    def __call__(self, seed):
        batch, old = to_global(make_batch(seed), self.mesh), self.state
        with jax.transfer_guard("disallow"):
            self.state, metrics = self.step(self.state, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
        same = lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim)
        assert all(jax.tree.leaves(jax.tree.map(same, self.state, self.shardings)))
        return [float(metrics["loss"]), float(metrics["grad_norm"])]

    def evaluate(self):
        evaluate = make_eval_step(self.net, self.mesh, Preprocessing())
        sums = evaluate(
            self.state.ema["params"], self.state.ema["stats"], to_global(make_batch(99), self.mesh)
        )
        return {k: float(v) for k, v in sums.items()}


def teacher_on(mesh):
    net, _, arrays = parts("lvvit")
    return Teacher(net, *jax.device_put(arrays, state_shardings(arrays, mesh)))


@functools.cache
def one_device(family, kind):
    """What one device finds: losses and norms of five steps, and the evaluation of the average."""
    run = Run(family, {}, kind)
    return [run(i) for i in range(5)], run.evaluate()


def check_equal(family, sizes, kind="MixToken"):
    expected, evaluation = one_device(family, kind)
    run = Run(family, sizes, kind)
    found = [run(i) for i in range(5)]
    np.testing.assert_allclose(np.array(found)[:, 0], np.array(expected)[:, 0], atol=1e-5)
    np.testing.assert_allclose(np.array(found)[:, 1], np.array(expected)[:, 1], rtol=1e-4)
    assert run.evaluate() == pytest.approx(evaluation, abs=1e-3)
    return run


def test_losses_equal_those_of_one_device():
    run = check_equal("vit", MODES["fsdp x model"], "quick")
    on_device, whole = state_bytes(run.state)
    assert on_device < 0.5 * whole


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_lvvit_like_one_device(mode):
    check_equal("lvvit", MODES[mode])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp", "fsdp x model"])
@pytest.mark.parametrize(
    "family", ["lvvit_remat", "lvvit_scan", "t2t", "t2t_se", "t2t_ghost", "t2t_dense", "deit", "deit3"]
)
def test_every_family_trains_like_one_device(family, mode):
    check_equal(family, MODES[mode])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["data", "data x fsdp"])
def test_fused_attention_trains_like_one_device(mode):
    check_equal("lvvit_fused", MODES[mode])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp", "model", "data x fsdp x model"])
def test_a_teacher_with_mixup_and_cutmix(mode):
    check_equal("deit_distilled", MODES[mode], "teacher")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["data x fsdp", "data x model", "fsdp x model"])
def test_accumulation(mode):
    check_equal("lvvit", MODES[mode], "accumulate")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp", "model"])
def test_only_the_modes_own_collectives(mode):
    """FSDP gathers a split kernel once. Tensor parallelism sums activations and moves qkv kernels."""
    run = Run("vit", MODES[mode])
    text = run.step.lower(run.state, to_global(make_batch(0), run.mesh)).compile().as_text()
    assert "collective-permute" not in text
    assert ("all-to-all" in text) == (mode == "model")
    if mode == "fsdp":
        split = [s for s in jax.tree.leaves(state_shardings(run.state.params, run.mesh)) if s.spec]
        assert text.count(" all-gather(") <= len(split)


def flat(state):
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return [np.array(x) for x in jax.tree.leaves(state)]  # a copy: the state is donated


@pytest.mark.slow
@pytest.mark.parametrize("other", ["fsdp x model", "data"])
def test_a_checkpoint_of_one_mesh_resumes_on_another(other, tmp_path):
    """Bit for bit on the same mesh."""
    run = Run("vit", MODES["data x fsdp"])
    run(0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(run.state)
    saved = flat(run.state)
    later = [run(i) for i in (1, 2)]
    for mode in ("data x fsdp", other):
        again = Run("vit", MODES[mode])
        target = abstract_state(lambda: model("vit"), again.tx, mesh=again.mesh)
        with Checkpoints(tmp_path) as checkpoints:
            again.state, _ = checkpoints.restore(target)
        for a, b in zip(flat(again.state), saved, strict=True):
            np.testing.assert_array_equal(a, b)
        found = [again(i) for i in (1, 2)]
        if mode == other:
            np.testing.assert_allclose(found, later, rtol=1e-4)
            np.testing.assert_allclose(np.array(found)[:, 0], np.array(later)[:, 0], atol=1e-5)
        else:
            assert found == later
            for a, b in zip(flat(again.state), flat(run.state), strict=True):
                np.testing.assert_array_equal(a, b)


def test_new_weights_do_not_depend_on_the_mesh():
    tx = optax.sgd(0.1, momentum=0.9)
    start = [
        flat(init_state(lambda: model("vit"), tx, mesh=make_mesh(**sizes), seed=4))
        for sizes in ({}, MODES["fsdp x model"])
    ]
    for a, b in zip(*start, strict=True):
        np.testing.assert_array_equal(a, b)


def test_data_parallelism_adds_nothing_to_the_program():
    """The only constraint is that of the MixToken masks. test_step.py reads the collectives."""
    net, *_ = abstract_model(lambda: model("vit"))
    mesh, tx = make_mesh(), parts("vit")[1]
    state = abstract_state(lambda: model("vit"), tx, mesh=mesh)
    step = make_train_step(net, tx, mesh, CONFIG, INFO)
    text = step.lower(state, to_global(make_batch(0), mesh)).as_text()
    assert text.count("sharding_constraint") == 2  # mask and lam
    assert "fsdp" not in text
