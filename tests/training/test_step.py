"""The jitted steps: devices, accumulation, donation, precision and randomness."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tlvit
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.config import Augment, Config, Distill, Ema, Loss, Optim
from tlvit.models.functional import functionalize
from tlvit.ops import losses
from tlvit.ops.mixing import draw_image_mix, draw_mixtoken_mask, mix_by_area, mix_images
from tlvit.ops.normalize import normalize
from tlvit.ops.targets import make_targets, smooth_one_hot
from tlvit.training.mesh import make_mesh, replicated
from tlvit.training.optimizer import make_optimizer
from tlvit.training.prefetch import to_global
from tlvit.training.state import abstract_model, state_from
from tlvit.training.step import Teacher, first_part, make_eval_step, make_train_step
from tlvit.types import Batch, ModelOutput, ScoreMaps

CLASSES, SIZE, GRID = 5, 64, (4, 4)
INFO = ModelInfo("lvvit_s", CLASSES, (SIZE, SIZE))


def settings(augment=None, loss=None, ema=None, **options):
    """Settings of a step without augmentation, unless they are given; options are those of Config."""
    return Config(
        augment=Augment(**{"randaugment": "", "random_erasing": 0.0, **(augment or {})}),
        loss=Loss(**{"plain_labels": True, **(loss or {})}),
        ema=Ema(**{"decay": 0.9, **(ema or {})}),
        **options,
    )


PLAIN = settings(loss={"mixtoken": False})
LABELS = settings(token_labels=False)
DEFAULT = settings()
ERASING = settings(augment={"random_erasing": 0.25})


def build(name="lvvit_s", **options):
    base = {"dim": 16, "depth": 1, "num_heads": 2, "image_size": SIZE, "num_classes": CLASSES}
    if name != "vit":
        base["stem_width"] = 4
    return tlvit.create_model(name, **{**base, **options})


build_vit = functools.partial(build, "vit")
build_dropping = functools.partial(build, drop_path=0.5)
build_bfloat16 = functools.partial(build, dtype=jnp.bfloat16)


def make_batch(size=16, seed=0, maps=True):
    """Random images, score maps, crops and flips."""
    rng = np.random.RandomState(seed)
    index = np.argsort(rng.rand(size, CLASSES, 6, 6), axis=1)[:, :3].astype(np.uint16)
    value = (3 * rng.standard_normal(index.shape)).astype(np.float16)
    geometry = np.zeros((size, 2, 3), np.float32)
    geometry[:, 0, 0], geometry[:, 1, 1] = 0.7 * np.where(rng.rand(size) < 0.5, 1, -1), 0.6
    geometry[:, 0, 2], geometry[:, 1, 2] = np.where(geometry[:, 0, 0] > 0, 0.1, 0.8), rng.rand(size) * 0.4
    return Batch(
        image=rng.randint(256, size=(size, SIZE, SIZE, 3)).astype(np.uint8),
        label=rng.randint(CLASSES, size=size).astype(np.int32),
        mask=np.ones(size, bool),
        maps=ScoreMaps(value, index) if maps else None,
        geometry=geometry,
    )


def make_tx(params):
    return make_optimizer(params, learning_rate=3e-3)


def frozen(params):
    return optax.set_to_zero()


def sgd(params):
    return optax.sgd(0.1)


def initial(path, leaf):
    """A usual initialization by numpy: no program has to be compiled for it."""
    name = path[-1].key
    if name in ("scale", "var"):
        return np.ones(leaf.shape, np.float32)
    values = np.random.RandomState(zlib.crc32(jax.tree_util.keystr(path).encode())).standard_normal(
        leaf.shape
    )
    return (values / np.sqrt(np.prod(leaf.shape[:-1])) if name == "kernel" else 0.02 * values).astype(
        np.float32
    )


@functools.cache
def start(model, tx, ema):
    """(net, optimizer, the host's copy of the state at step 0): what the runs of this file share."""
    net, *shapes = abstract_model(model)
    params, stats = jax.tree_util.tree_map_with_path(initial, shapes)
    state = state_from(params, stats, tx(params), seed=3, ema=ema)
    return net, tx(params), host(dataclasses.replace(state, key=jax.random.key_data(state.key)))


COMPILED = {}


def compiled(devices, model, tx, ema, config, mix_shards):
    """The step; tests that ask for the same one share it."""
    key = repr((devices, model, tx, ema, config, mix_shards))
    if key not in COMPILED:
        net, optimizer, _ = start(model, tx, ema)
        mesh = make_mesh(jax.devices()[:devices])
        COMPILED[key] = make_train_step(net, optimizer, mesh, config, INFO, mix_shards=mix_shards)
    return COMPILED[key]


class Run:
    """A state and its step on some devices; every call trains one step and gives its metrics."""

    def __init__(self, devices=1, *, config=None, model=build, tx=make_tx, ema=True, mix_shards=None):
        self.mesh = make_mesh(jax.devices()[:devices])
        self.net, self.tx, state = start(model, tx, ema)
        state = dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))
        self.state = jax.device_put(state, replicated(self.mesh))
        self.step = compiled(devices, model, tx, ema, config or DEFAULT, mix_shards)

    def __call__(self, batch):
        self.state, metrics = self.step(self.state, to_global(batch, self.mesh))
        assert {(x.shape, str(x.dtype)) for x in metrics.values()} == {((), "float32")}
        return {k: float(v) for k, v in metrics.items()}


def host(tree):
    """A copy that donation cannot take away."""
    return jax.tree.map(lambda x: np.array(x), tree)


def largest_difference(a, b):
    return max(
        jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"config": PLAIN}, id="plain", marks=pytest.mark.slow),
        pytest.param({"config": ERASING, "mix_shards": 8}, id="mixtoken"),
        pytest.param(
            {"config": settings(augment={"mixup": 0.8, "cutmix": 1.0}, token_labels=False), "mix_shards": 8},
            id="mixup",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_and_eight_devices_give_the_same_losses(options):
    one, eight = Run(1, **options), Run(8, **options)
    for i in range(4):
        a, b = one(make_batch(seed=i)), eight(make_batch(seed=i))
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-4
    assert largest_difference(one.state.stats, eight.state.stats) < 1e-5
    assert int(one.state.step) == int(eight.state.step) == 4


def test_devices_only_exchange_sums():
    """Gradients and batch statistics are all-reduced; images, tokens and random draws stay local."""
    run = Run(8, config=ERASING, mix_shards=8)
    text = run.step.lower(run.state, to_global(make_batch(), run.mesh)).compile().as_text()
    assert "all-reduce" in text
    assert [
        k for k in ("all-to-all", "collective-permute", "all-gather", "reduce-scatter") if k in text
    ] == []
    waits = [line.strip()[:120] for line in text.splitlines() if " all-reduce(" in line and "pred[]" in line]
    assert waits == []


def test_the_loss_of_the_first_step_is_the_formula():
    """Normalized on the device, targets from the maps, by hand from the parts."""
    loss = {
        "mixtoken": False, "dense_weight": 0.5, "cls_weight": 0.7, "cls_target": "documented",
        "label_smoothing": 0.2,
    }  # fmt: skip
    run, batch = Run(1, config=settings(loss=loss)), make_batch()
    images = (batch.image / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    state = host((run.state.params, run.state.stats))
    forward = jax.jit(functools.partial(run.net.apply, train=True))
    output, stats = forward(*state, images.astype(np.float32))
    targets = make_targets(
        batch.maps, batch.label, batch.geometry, grid=GRID, num_classes=CLASSES, smoothing=0.2
    )
    expected = losses.token_label_loss(
        output, targets, dense_weight=0.5, cls_weight=0.7, cls_target="documented"
    )
    assert abs(run(batch)["loss"] - float(expected)) < 1e-5
    assert largest_difference(run.state.stats, stats) < 1e-5


def test_without_token_labels_the_class_token_learns_the_label():
    run, batch = Run(1, config=LABELS, ema=False), make_batch(maps=False)
    forward = jax.jit(functools.partial(run.net.apply, train=True))
    output, _ = forward(run.state.params, run.state.stats, normalize(batch.image))
    labels = smooth_one_hot(batch.label, CLASSES, 0.1)
    expected = float(jnp.mean(losses.soft_cross_entropy(output.cls, labels)))
    assert abs(run(batch)["loss"] - expected) < 1e-5
    assert run.state.ema is None


@pytest.mark.slow
def test_bce_makes_both_classes_of_a_mixed_image_positive():
    """As in DeiT III: both classes of the mixed image have the target 1; the loss is the mean of all."""
    mixed = {
        "augment": {"mixup": 0.8},
        "loss": {"kind": "bce", "label_smoothing": 0.0, "plain_labels": False},
    }
    run = Run(1, config=settings(token_labels=False, **mixed), ema=False)
    batch = dataclasses.replace(make_batch(maps=False), image=np.full((16, SIZE, SIZE, 3), 90, np.uint8))
    output, _ = jax.jit(functools.partial(run.net.apply, train=True))(
        run.state.params, run.state.stats, normalize(batch.image)
    )  # equal images stay the same when they are mixed; a batch is mixed with its reverse
    one_hot = np.eye(CLASSES)[batch.label]
    positive = np.maximum(one_hot, one_hot[::-1])
    x = np.asarray(output.cls, np.float64)
    expected = (np.logaddexp(0, x) - positive * x).mean()
    assert abs(run(batch)["loss"] - expected) < 1e-5


def test_relabel_teaches_the_class_token_the_pooled_map():
    """Any model learns it: this one has no token head. The target is that of the published code."""
    relabel = {"dense_weight": 0.0, "mixtoken": False, "label_smoothing": 0.0}
    run, batch = Run(1, config=settings(loss=relabel), model=build_vit, ema=False), make_batch()
    output, _ = jax.jit(functools.partial(run.net.apply, train=True))(
        run.state.params, run.state.stats, normalize(batch.image)
    )
    targets = make_targets(
        batch.maps, batch.label, batch.geometry, grid=GRID, num_classes=CLASSES, smoothing=0
    )
    expected = float(jnp.mean(losses.soft_cross_entropy(output.cls, targets.cls)))
    assert output.tokens is None
    assert abs(run(batch)["loss"] - expected) < 1e-5


@pytest.mark.slow
def test_mixtoken_without_maps_mixes_the_labels_by_area():
    """The published command for other data sets: MixToken with dense_weight 0 and no label data."""
    loss = {"dense_weight": 0.0, "cls_target": "label"}
    run, batch = Run(1, config=settings(loss=loss), model=build_vit, ema=False), make_batch(maps=False)
    key = jax.random.split(jax.random.fold_in(run.state.key, 0), 4)[0]
    mix = draw_mixtoken_mask(key, GRID)
    assert 0 < float(mix.lam[0]) < 1
    output, _ = jax.jit(functools.partial(run.net.apply, train=True))(
        run.state.params, run.state.stats, normalize(batch.image), mix=mix
    )
    labels = mix_by_area(smooth_one_hot(batch.label, CLASSES, 0.1), mix)
    expected = float(jnp.mean(losses.soft_cross_entropy(output.cls, labels)))
    assert abs(run(batch)["loss"] - expected) < 1e-5


@pytest.mark.slow
def test_pooled_targets_may_be_mixed_with_the_images():
    """ReLabel with CutMix: as with labels, the pooled targets follow the areas."""
    relabel = {"dense_weight": 0.0, "mixtoken": False}
    config = settings(augment={"cutmix": 1.0}, loss=relabel)
    run, batch = Run(1, config=config, model=build_vit, ema=False), make_batch()
    key = jax.random.split(jax.random.fold_in(run.state.key, 0), 4)[0]
    mix = draw_image_mix(key, (SIZE, SIZE), mixup=0.0, cutmix=1.0)
    output, _ = jax.jit(functools.partial(run.net.apply, train=True))(
        run.state.params, run.state.stats, mix_images(normalize(batch.image), mix)
    )
    targets = make_targets(batch.maps, batch.label, batch.geometry, grid=GRID, num_classes=CLASSES)
    expected = jnp.mean(losses.soft_cross_entropy(output.cls, mix_by_area(targets.cls, mix)))
    assert abs(run(batch)["loss"] - float(expected)) < 1e-5


class Recorder:
    """The part of a Net that a step uses; it keeps the images that the model would see."""

    grid, task = None, "classification"

    def __init__(self):
        self.seen = []

    def apply(self, params, stats, images, **options):
        self.seen.append(np.asarray(images))
        cls = params["a"][None, :] * jnp.ones((len(images), 1))
        return ModelOutput(logits=cls, cls=cls), stats


def test_images_are_normalized_by_the_mean_and_std_of_the_model():
    rule = Preprocessing(mean=(0.1, 0.5, 0.9), std=(0.1, 0.2, 0.4))
    net, tx, batch = Recorder(), optax.sgd(0.0), make_batch(4, maps=False)
    info = dataclasses.replace(INFO, preprocessing=rule)
    step = make_train_step(net, tx, make_mesh(jax.devices()[:1]), LABELS, info)
    with jax.disable_jit():
        step(state_from({"a": jnp.zeros(CLASSES)}, {}, tx, ema=False), batch)
    (images,) = net.seen
    np.testing.assert_allclose(images, (batch.image / 255.0 - rule.mean) / rule.std, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("erase_mixed", [False, True])
def test_erasing_before_or_after_mixing(erase_mixed):
    """Of equal images mixup changes the noise of erased boxes only: blended, it has a smaller variance."""
    augment = {"mixup": 1000.0, "random_erasing": 1.0, "erase_mixed": erase_mixed}
    config = settings(augment=augment, token_labels=False)
    net = Recorder()
    step = make_train_step(net, optax.sgd(0.0), make_mesh(jax.devices()[:1]), config, INFO)
    image = np.full((16, SIZE, SIZE, 3), 255, np.uint8)
    batch = dataclasses.replace(make_batch(maps=False), image=image)
    state = state_from({"a": jnp.zeros(CLASSES)}, {}, optax.sgd(0.0), seed=0, ema=False)
    with jax.disable_jit():
        step(state, batch)
    white = np.asarray(normalize(image[:1, :1, :1]))
    (images,) = net.seen
    changed = np.abs(images - white).max(-1) > 1e-5
    values = images[changed]
    if erase_mixed:  # standard normal noise in place of white
        assert abs(values.mean()) < 0.1
        assert 0.9 < values.std() < 1.1
    else:  # where one of two images is erased, half of the white shines through
        assert values.mean() > 0.8
    assert len(set(changed.mean((1, 2)).round(4))) > 4


@pytest.mark.slow
def test_accumulation_equals_one_batch_without_batch_norm():
    options = {"model": build_vit, "tx": sgd}
    halves = settings(token_labels=False, optim=Optim(accumulate=2))
    whole, parts = Run(1, config=LABELS, **options), Run(1, config=halves, **options)
    spread = Run(4, config=halves, **options)
    for i in range(3):
        a = whole(make_batch(seed=i))
        for run in (parts, spread):
            b = run(make_batch(seed=i))
            assert abs(a["loss"] - b["loss"]) < 1e-5
            assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-5
    assert largest_difference(whole.state.params, parts.state.params) < 1e-5
    assert largest_difference(whole.state.params, spread.state.params) < 1e-5


@pytest.mark.slow
def test_accumulation_moves_the_statistics_once_a_part():
    """Two parts of equal content move BatchNorm twice: 1 - 0.9^2 of the way."""
    half = make_batch(8)
    batch = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), half)  # part p holds images p, p + 2, …
    halves = settings(loss={"mixtoken": False}, optim=Optim(accumulate=2))
    run, once = Run(1, config=halves), Run(1, config=PLAIN)
    start = host(run.state.stats)
    loss, loss_once = run(batch)["loss"], once(half)["loss"]
    assert abs(loss - loss_once) < 1e-5
    first = jax.tree.map(lambda old, new: new - old, start, host(once.state.stats))
    twice = jax.tree.map(lambda old, step: old + 1.9 * step, start, first)
    assert largest_difference(run.state.stats, twice) < 1e-5


@pytest.mark.slow
def test_accumulation_stays_on_the_devices():
    run = Run(8, config=settings(optim=Optim(accumulate=2)))
    text = run.step.lower(run.state, to_global(make_batch(), run.mesh)).compile().as_text()
    assert [k for k in ("all-to-all", "collective-permute", "all-gather") if k in text] == []


def test_the_first_part_of_a_batch_is_on_all_devices():
    mesh = make_mesh()
    batch = to_global(make_batch(), mesh)
    part = first_part(batch, 2, mesh)
    np.testing.assert_array_equal(part.label, np.asarray(batch.label)[::2])
    np.testing.assert_array_equal(part.image, np.asarray(batch.image)[::2])
    assert part.image.sharding.is_equivalent_to(batch.image.sharding, part.image.ndim)
    assert first_part(batch, 1, mesh) is batch


@pytest.mark.slow
def test_the_old_state_is_given_away():
    run = Run(8)
    old = run.state
    run(make_batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert not any(x.is_deleted() for x in jax.tree.leaves(run.state))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(run.state))


@pytest.mark.slow
def test_the_average_follows_parameters_and_statistics():
    run = Run(1)
    expected = host(run.state.ema)
    for i in range(3):
        run(make_batch(seed=i))
        new = {"params": run.state.params, "stats": run.state.stats}
        expected = jax.tree.map(lambda old, x: 0.9 * old + 0.1 * np.asarray(x), expected, new)
        assert largest_difference(run.state.ema, expected) < 1e-5
    assert largest_difference(run.state.ema["stats"], run.state.stats) > 1e-3
    warm = Run(1, config=settings(ema={"warmup": True}))
    start = host(warm.state.ema)
    warm(make_batch())
    new = {"params": warm.state.params, "stats": warm.state.stats}
    expected = jax.tree.map(lambda old, x: 0.1 * old + 0.9 * np.asarray(x), start, new)
    assert largest_difference(warm.state.ema, expected) < 1e-5


@pytest.mark.slow
def test_randomness_depends_on_key_and_step_alone():
    options = {"model": build_dropping, "tx": frozen}
    first, second = Run(1, **options), Run(1, **options)
    batch = make_batch()
    a, b = [first(batch)["loss"] for _ in range(3)], [second(batch)["loss"] for _ in range(3)]
    assert a == b  # bit for bit
    assert len({round(x, 5) for x in a}) == 3  # another step, another draw
    other = Run(1, **options)
    other.state = dataclasses.replace(other.state, key=jax.random.key(99))
    assert other(batch)["loss"] != a[0]
    resumed = Run(1, **options)
    resumed.state = dataclasses.replace(resumed.state, step=jnp.int32(2))
    assert resumed(batch)["loss"] == a[2]


@pytest.mark.slow
def test_bfloat16_computes_low_and_keeps_high():
    exact, low = Run(1, config=PLAIN), Run(1, model=build_bfloat16, config=PLAIN)
    a, b = exact(make_batch())["loss"], low(make_batch())["loss"]
    assert 1e-6 < abs(a - b) < 0.02 * a
    for tree in (low.state.params, low.state.stats, low.state.ema, low.state.opt_state):
        assert {str(x.dtype) for x in jax.tree.leaves(tree)} <= {"float32", "int32"}
    text = low.step.lower(low.state, to_global(make_batch(), low.mesh)).as_text()
    assert "tensor<16x4x4x16xbf16>" in text  # the stem's output


@pytest.mark.slow
def test_a_tiny_problem_is_learned():
    """Color tells the class; eight images, eighty steps."""
    rng = np.random.RandomState(0)
    label = np.arange(8, dtype=np.int32) % 4
    color = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [200, 200, 40]])[label]
    image = (color[:, None, None, :] + rng.randint(-20, 20, (8, SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)
    index = np.broadcast_to(label.reshape(8, 1, 1, 1), (8, 1, 6, 6)).astype(np.uint16)
    maps = ScoreMaps(np.full(index.shape, 8, np.float16), index)
    batch = Batch(image, label, np.ones(8, bool), maps, make_batch(8).geometry)
    run = Run(1, config=PLAIN)
    seen = [run(batch)["loss"] for _ in range(80)]
    # Targets smoothed by 0.1 over 5 classes keep an entropy of 0.3 to 0.4 in each of the two terms.
    assert seen[0] > 2.5
    assert seen[-1] < 1.1
    evaluate = make_eval_step(run.net, run.mesh, Preprocessing())
    assert float(evaluate(run.state.params, run.state.stats, batch)["top1"]) == 8


def test_evaluation_uses_running_statistics_and_counts_no_padding():
    batch = make_batch(16)
    mask = np.arange(16) < 11
    batch = Batch(batch.image, batch.label, mask, None, batch.geometry)
    for devices in (1, 8):
        run = Run(devices)
        evaluate = make_eval_step(run.net, run.mesh, Preprocessing())
        sums = evaluate(run.state.params, run.state.stats, to_global(batch, run.mesh))
        logits = jax.jit(run.net.apply)(*host((run.state.params, run.state.stats)), normalize(batch.image))[
            0
        ].logits
        logits = np.asarray(logits, np.float64)
        loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(16), batch.label]
        np.testing.assert_allclose(sums["loss"], loss[mask].sum(), rtol=1e-5)
        assert float(sums["count"]) == 11
        assert float(sums["top1"]) == (logits.argmax(1) == batch.label)[mask].sum()


def test_errors():
    with pytest.raises(ValueError, match=r"16 images.*3 equal parts"):
        Run(1, config=settings(optim=Optim(accumulate=3)))(make_batch())
    with pytest.raises(ValueError, match=r"16 images.*3 equal shards"):
        Run(1, mix_shards=3)(make_batch())
    with pytest.raises(ValueError, match="token head"):
        Run(1, model=build_vit)(make_batch())


def test_token_labels_without_maps_are_a_clear_error():
    with pytest.raises(ValueError, match="score maps"):
        Run(1)(make_batch(maps=False))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_teacher_trains_the_distillation_token(kind):
    """The loss of the first step, computed from its parts; the teacher's arrays are neither constants nor
    changed."""
    options = {"dim": 16, "depth": 1, "num_heads": 2, "image_size": SIZE, "num_classes": CLASSES}
    student = functionalize(tlvit.create_model("deit_tiny_distilled_patch16_224", seed=1, **options))
    teacher = functionalize(build(seed=2))
    distill = {"kind": kind, "alpha": 0.3, "tau": 2.0}
    mesh, batch = make_mesh(), make_batch(maps=False)
    config = settings(token_labels=False, distill=Distill(teacher="teacher", **distill))
    step = make_train_step(student[0], sgd(None), mesh, config, INFO, teacher=Teacher(*teacher))
    state = jax.device_put(state_from(*student[1:], sgd(None), ema=False), replicated(mesh))
    new, metrics = step(state, to_global(batch, mesh))
    images = normalize(batch.image)
    output, _ = student[0].apply(*student[1:], images)
    logits = teacher[0].apply(*teacher[1:], images)[0].logits
    labels = smooth_one_hot(jnp.asarray(batch.label), CLASSES, 0.1)
    expected = losses.distillation_loss(output, labels, logits, **distill)
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    moved = {
        k: float(jnp.abs(new.params[k]["kernel"] - student[1][k]["kernel"]).max())
        for k in ("head", "head_dist")
    }
    assert min(moved.values()) > 0  # both heads learn
