"""Schedule, decay mask, optimizer and moving average at points computed by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tlvit
from tlvit.config import Config, Optim
from tlvit.models.functional import functionalize
from tlvit.training import optimizer


def cosine(t, peak=1.6e-3, lowest=1e-5, epochs=300):
    return lowest + 0.5 * (peak - lowest) * (1 + math.cos(math.pi * t / epochs))


def warmup(t, peak=1.6e-3):
    return 1e-6 + t * (peak - 1e-6) / 5


def schedule_of(epochs=300, steps_per_epoch=10, batch_size=1024, **options):
    return optimizer.make_schedule(
        Optim(**options), epochs=epochs, steps_per_epoch=steps_per_epoch, batch_size=batch_size
    )


def test_the_published_schedule():
    """Warm-up 5 from 1e-6, cosine from 1.6e-3 to 1e-5 at 300, ten cooldown epochs; changes every epoch."""
    schedule = jax.jit(schedule_of(steps_per_epoch=1251))
    points = {
        0: 1e-6,
        1: warmup(1),
        4: warmup(4),
        5: cosine(5),
        150: 8.05e-4,
        299: cosine(299),
        300: 1e-5,
        309: 1e-5,
    }
    for epoch, rate in points.items():
        for step in (epoch * 1251, epoch * 1251 + 600, epoch * 1251 + 1250):
            np.testing.assert_allclose(schedule(step), rate, rtol=2e-5, err_msg=f"step {step}")
    assert schedule(0).dtype == jnp.float32
    assert warmup(1) == pytest.approx(3.208e-4)


def test_the_published_polynomial(golden):
    """Of segmentation: in steps, the warm-up as a factor of the decayed rate."""
    z = golden("seg_visible.npz")
    optim = Optim(
        schedule="poly", learning_rate=6e-5, base_batch_size=16, warmup_steps=1500, warmup_lr=6e-11,
        min_lr=0.0, schedule_unit="step",
    )  # fmt: skip
    config = Config(steps=160_000, optim=optim)
    epochs = config.schedule_epochs(1263)  # 20,210 images in batches of 16
    schedule = jax.jit(optimizer.make_schedule(optim, epochs=epochs, steps_per_epoch=1263, batch_size=16))
    for step, rate in zip(z["lr/iterations"], z["lr/lr"], strict=True):
        np.testing.assert_allclose(schedule(int(step)), rate, rtol=2e-6, err_msg=f"step {step}")
    assert float(schedule(160_000)) == float(schedule(170_000)) == 0
    assert config.total_steps(1263) == 160_000


def test_a_polynomial_to_a_floor():
    schedule = schedule_of(
        epochs=10, schedule="poly", power=2.0, learning_rate=1.0, min_lr=0.2, warmup_epochs=0.0,
        schedule_unit="epoch",
    )  # fmt: skip
    for epoch in (0, 5, 10, 12):
        for step in (10 * epoch, 10 * epoch + 9):
            expected = 0.2 + 0.8 * max(1 - epoch / 10, 0) ** 2
            np.testing.assert_allclose(schedule(step), expected, rtol=1e-6)


@pytest.mark.parametrize("compiled", [True, False])
def test_epochs_begin_with_their_first_step_whatever_their_length(compiled):
    """In float32 41 * (1 / 41) is less than 1, and compilers divide so: the rate would come late."""
    epochs = jnp.arange(21, dtype=jnp.int32)

    def rates_of_all_lengths():
        schedule = lambda n: schedule_of(epochs=20, steps_per_epoch=n, learning_rate=1.0, warmup_epochs=0)
        return {n: schedule(n)(epochs * n) for n in range(1, 200)}

    expected = np.array([cosine(t, 1.0, epochs=20) for t in range(21)])
    found = (jax.jit(rates_of_all_lengths) if compiled else rates_of_all_lengths)()
    assert [n for n, rates in found.items() if np.abs(rates - expected).max() > 1e-4] == []


def test_changes_every_step_and_lag():
    schedule = schedule_of(schedule_unit="step")
    for step, rate in {
        0: 1e-6,
        5: warmup(0.5),
        49: warmup(4.9),
        50: cosine(5),
        1505: cosine(150.5),
        3050: 1e-5,
    }.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=2e-5)
    late = schedule_of(lag_epochs=1)
    for epoch, rate in {0: 1e-6, 1: 1e-6, 2: warmup(1), 6: cosine(5), 300: cosine(299), 301: 1e-5}.items():
        np.testing.assert_allclose(late(epoch * 10 + 3), rate, rtol=2e-5)
    none = schedule_of(epochs=10, steps_per_epoch=3, learning_rate=1.0, warmup_epochs=0)
    np.testing.assert_allclose(none(0), 1.0, rtol=1e-6)


def test_an_epoch_without_a_step_is_refused():
    with pytest.raises(ValueError, match="at least one step in an epoch, not 0"):
        schedule_of(epochs=3, steps_per_epoch=0)


def test_linear_scaling():
    optim = Optim(learning_rate=1.6e-3, base_batch_size=1024)
    assert optimizer.peak_learning_rate(optim, 256) == pytest.approx(4e-4)
    np.testing.assert_allclose(schedule_of(batch_size=512, warmup_epochs=0)(0), 8e-4, rtol=1e-6)


def test_a_lowest_learning_rate_above_the_peak_is_refused():
    with pytest.raises(
        ValueError, match=r"min_lr is 1e-05, above .* 6.25e-06 \(0.0016 for a batch of 1024, "
    ):
        schedule_of(batch_size=4)
    schedule_of(batch_size=4, learning_rate=0.0)


def test_decay_mask_of_lvvit():
    """timm's rule by official name: not vectors, not pos_embed, not cls_token."""
    _, params, _ = functionalize(nnx.eval_shape(lambda: tlvit.create_model("lvvit_t")))
    mask = optimizer.decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    decayed = {
        ".".join(p.key for p in path) for path, value in jax.tree_util.tree_leaves_with_path(mask) if value
    }
    expected = {f"patch_embed.{name}.kernel" for name in ("conv1", "conv2", "conv3", "proj")}
    expected |= {"head.kernel", "aux_head.kernel"}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected |= {f"blocks.{i}.{part}.kernel" for i in range(12) for part in parts}
    assert decayed == expected
    assert not optimizer.decay_mask({"dist_token": jnp.zeros((1, 1, 4))})["dist_token"]


def adamw(p, grads, rates, decay, b1=0.9, b2=0.999, eps=1e-8):
    """torch's AdamW in numpy."""
    m = v = 0.0
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
        p = p * (1 - rate * decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def descend(tx, params, grads):
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adamw_equals_torchs():
    rng = np.random.RandomState(0)
    params = {"kernel": rng.randn(3, 4).astype(np.float32), "bias": rng.randn(4).astype(np.float32)}
    grads = [{k: rng.randn(*v.shape).astype(np.float32) for k, v in params.items()} for _ in range(5)]
    rates = [0.1, 0.05, 0.2, 0.1, 0.01]
    tx = optimizer.make_optimizer(
        params, learning_rate=lambda step: jnp.array(rates)[step], weight_decay=0.3, epsilon=1e-6, beta2=0.99
    )
    got = descend(tx, params, grads)
    for key, decay in (("kernel", 0.3), ("bias", 0.0)):
        expected = adamw(params[key], [g[key] for g in grads], rates, decay, eps=1e-6, b2=0.99)
        np.testing.assert_allclose(got[key], expected, atol=1e-5)


def test_sgd_equals_torchs():
    """torch's SGD: decay joins the gradient, Nesterov momentum."""
    rng = np.random.RandomState(1)
    params = {"kernel": rng.randn(3, 4).astype(np.float32)}
    grads = [rng.randn(3, 4).astype(np.float32) for _ in range(4)]
    tx = optimizer.make_optimizer(params, name="sgd", learning_rate=0.1, weight_decay=0.2, beta1=0.8)
    got = descend(tx, params, [{"kernel": g} for g in grads])["kernel"]
    p, buffer = params["kernel"], 0.0
    for g in grads:
        g = g + 0.2 * p
        buffer = 0.8 * buffer + g
        p = p - 0.1 * (g + 0.8 * buffer)
    np.testing.assert_allclose(got, p, atol=1e-5)


def test_momentum_equals_torchs_sgd():
    """torch's SGD without Nesterov: the decay joins the gradient, the learning rate multiplies the buffer."""
    rng = np.random.RandomState(2)
    params = {"kernel": rng.randn(3, 4).astype(np.float32)}
    grads = [rng.randn(3, 4).astype(np.float32) for _ in range(4)]
    rates = [0.1, 0.3, 0.05, 0.2]
    tx = optimizer.make_optimizer(
        params, name="momentum", learning_rate=lambda step: jnp.array(rates)[step], weight_decay=0.2
    )
    got = descend(tx, params, [{"kernel": g} for g in grads])["kernel"]
    p, buffer = params["kernel"], 0.0
    for g, rate in zip(grads, rates, strict=True):
        buffer = 0.9 * buffer + g + 0.2 * p
        p = p - rate * buffer
    np.testing.assert_allclose(got, p, atol=1e-5)


def test_clipping_is_by_the_global_norm():
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)}
    grads = {"a": jnp.full((2, 2), 3.0), "b": jnp.array([0.0, 8.0, 0.0])}  # norm 10
    plain = {"name": "sgd", "learning_rate": 1.0, "weight_decay": 0, "beta1": 0}
    step = lambda clip: descend(optimizer.make_optimizer(params, clip_norm=clip, **plain), params, [grads])
    jax.tree.map(lambda got, g: np.testing.assert_allclose(got, -g / 5, atol=1e-6), step(2.0), grads)
    for clip in (None, 20.0):
        jax.tree.map(lambda got, g: np.testing.assert_allclose(got, -g, atol=1e-6), step(clip), grads)


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_clipping_leaves_the_state_as_it_is_so_that_a_run_can_be_resumed_with_it(name):
    state = lambda clip: optimizer.make_optimizer(NESTED, name=name, learning_rate=0.1, clip_norm=clip).init(
        NESTED
    )
    assert jax.tree.structure(state(1.0)) == jax.tree.structure(state(None))


def test_every_optimizer_decays_only_what_is_masked():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "pos_embed": jnp.ones((1, 2, 2))}
    zero = jax.tree.map(jnp.zeros_like, params)
    for name in optimizer.OPTIMIZERS:
        after = descend(
            optimizer.make_optimizer(params, name=name, learning_rate=0.1, weight_decay=0.5), params, [zero]
        )
        assert float(after["kernel"].max()) < 1, name
        np.testing.assert_array_equal(after["bias"], 1)
        np.testing.assert_array_equal(after["pos_embed"], 1)
    with pytest.raises(ValueError, match="adamw, lamb, sgd, momentum, not 'adam'"):
        optimizer.make_optimizer(params, name="adam", learning_rate=0.1)


def test_moving_average():
    ema, new = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 0.0])}
    np.testing.assert_allclose(optimizer.update_ema(ema, new, 7, decay=0.9)["a"], [1.2, 1.8], atol=1e-6)
    # Warm-up: (1 + t) / (10 + t) until that passes the decay.
    for step, decay in {0: 0.1, 8: 0.5, 80: 0.9, 10000: 0.9}.items():
        got = optimizer.update_ema(ema, new, jnp.int32(step), decay=0.9, warmup=True)["a"]
        np.testing.assert_allclose(
            got, np.array([1.0, 2.0]) * decay + np.array([3.0, 0.0]) * (1 - decay), atol=1e-6
        )
    # A slow average still moves in float32.
    slow = optimizer.update_ema({"a": jnp.ones(1)}, {"a": jnp.full(1, 2.0)}, 0, decay=0.99992)["a"]
    np.testing.assert_allclose(slow - 1, [8e-5], rtol=2e-3)


NESTED = {
    "blocks": {str(i): {"kernel": np.ones((2, 3), np.float32)} for i in range(2)},
    "head": {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)},
}


def test_factors_of_the_learning_rate_by_name():
    """The longest matching pattern counts, in whatever order they are."""
    factors = lambda **scales: optimizer.learning_rate_factors(NESTED, scales)
    assert factors(**{"head/*": 2, "*": 0, "blocks/1*": 0.5}) == {
        "blocks": {"0": {"kernel": 0}, "1": {"kernel": 0.5}},
        "head": {"kernel": 2, "bias": 2},
    }
    assert factors(**{"*/bias": 0})["head"] == {"kernel": 1, "bias": 0}
    with pytest.raises(
        ValueError, match=r"no parameter matches 'Head/\*', 'kernel'; .* start with blocks, head"
    ):
        factors(**{"Head/*": 1, "kernel": 1, "*": 1})
    with pytest.raises(ValueError, match="freezes all parameters"):
        optimizer.scale_learning_rates(optax.sgd(0.1), NESTED, {"*": 0.0})
    with pytest.raises(ValueError, match=r"lr_scale has the factor -1 for '\*'"):
        Optim(lr_scale={"*": -1})


def test_frozen_parameters_do_not_change_and_others_have_their_rate():
    """Decay included; what is frozen has no part in the clipped norm."""
    scales = {"blocks/0/*": 0.0, "head/*": 0.5}
    loss = lambda params: sum(
        jnp.sum(1e3 * x) for x in jax.tree.leaves(optimizer.stop_frozen(params, scales))
    )
    grads = jax.grad(loss)(NESTED)
    make = lambda params, rate: optimizer.make_optimizer(
        params, learning_rate=rate, weight_decay=0.1, clip_norm=1.0
    )
    scaled = optimizer.scale_learning_rates(make(NESTED, 0.1), NESTED, scales)
    found = descend(scaled, NESTED, [grads])
    np.testing.assert_array_equal(found["blocks"]["0"]["kernel"], 1)
    without = lambda tree: {"blocks": {"1": tree["blocks"]["1"]}, "head": tree["head"]}
    full, half = (
        descend(make(without(NESTED), rate), without(NESTED), [without(grads)]) for rate in (0.1, 0.05)
    )
    np.testing.assert_allclose(found["blocks"]["1"]["kernel"], full["blocks"]["1"]["kernel"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found["head"], half["head"])
    assert np.abs(found["head"]["kernel"] - 1).min() > 0.04
    assert optimizer.stop_frozen(NESTED, {}) is NESTED


def test_layer_decay_is_beits():
    """The blocks below the head have one factor more each; the stem comes before the first block."""
    params = {
        **NESTED,
        "norm": {"scale": np.ones(3)},
        "cls_token": np.ones((1, 1, 3)),
        "patch_embed": NESTED["head"],
    }
    found = optimizer.learning_rate_factors(params, {"head/bias": 2, "blocks/1/*": 0}, 0.5)
    assert found == {
        "head": {"kernel": 1, "bias": 2},
        "norm": {"scale": 1},
        "blocks": {"0": {"kernel": 0.25}, "1": {"kernel": 0}},
        "cls_token": 0.125,
        "patch_embed": {"kernel": 0.125, "bias": 0.125},
    }
    model = {"backbone": {**params, "side_layer1": NESTED["head"]}, "decode_head": {"convs": NESTED["head"]}}
    found = optimizer.learning_rate_factors(model, {}, 0.5)
    assert found["decode_head"]["convs"] == found["backbone"]["side_layer1"] == {"kernel": 1, "bias": 1}
    assert found["backbone"]["blocks"]["0"] == {"kernel": 0.25}
    assert found["backbone"]["cls_token"] == 0.125
    with pytest.raises(ValueError, match=r"layer_decay needs a transformer .* start with head\. "):
        optimizer.learning_rate_factors({"head": NESTED["head"]}, {}, 0.5)


def run_rates(optim, params=NESTED, epochs=4):
    """The learning rates of every parameter at every epoch: SGD without momentum on gradients of 1."""
    tx, schedule = optimizer.run_optimizer(optim, params, epochs=epochs, steps_per_epoch=1, batch_size=64)
    state, ones, rates = tx.init(params), jax.tree.map(jnp.ones_like, params), []
    for _ in range(epochs + 1):
        updates, state = tx.update(ones, state, params)
        rates.append(jax.tree.map(lambda u: -float(u.ravel()[0]), updates))
    return rates, [float(schedule(step)) for step in range(epochs + 1)]


def test_the_published_transfer_of_t2t_vit_ends_at_one_rate(monkeypatch):
    """PyTorch's CosineAnnealingLR has one eta_min for the groups of 0.05 and 5e-4; the rest is frozen."""
    monkeypatch.setattr(optax, "sgd", lambda rate, **_: optax.scale_by_learning_rate(rate))
    published = {"name": "momentum", "learning_rate": 0.05, "base_batch_size": 64, "warmup_epochs": 0}
    scales = {"*": 0, "head/*": 1, "blocks/1/*": 0.01}
    optim = Optim(**published, min_lr=2e-4, weight_decay=0, lr_scale=scales, scale_min_lr=False)
    rates, schedule = run_rates(optim)
    np.testing.assert_allclose(schedule, [cosine(t, 0.05, 2e-4, 4) for t in range(5)], rtol=1e-5)
    np.testing.assert_allclose([r["head"]["kernel"] for r in rates], schedule, rtol=1e-5)
    backbone = [r["blocks"]["1"]["kernel"] for r in rates]
    np.testing.assert_allclose(backbone, [cosine(t, 5e-4, 2e-4, 4) for t in range(5)], rtol=1e-5)
    assert {r["blocks"]["0"]["kernel"] for r in rates} == {0.0}
    scaled, _ = run_rates(Optim(**published, min_lr=2e-4, weight_decay=0, lr_scale=scales))
    np.testing.assert_allclose(
        [r["blocks"]["1"]["kernel"] for r in scaled], 0.01 * np.array(schedule), rtol=1e-5
    )
    with pytest.raises(
        ValueError, match=r"min_lr is 0.001, .* 0.0005 \(0.05 for a batch of 64, .* times 0.01 by"
    ):
        run_rates(Optim(**published, min_lr=1e-3, lr_scale=scales, scale_min_lr=False))


def test_rates_of_zero_stay_finite():
    """A warm-up from 0, and a cosine that ends at 0 before the run does."""
    zero = {"warmup_lr": 0.0, "warmup_epochs": 2, "min_lr": 0.0, "weight_decay": 0}
    scales = {"scale_min_lr": False, "lr_scale": {"blocks/*": 0.01}}
    tx, schedule = optimizer.run_optimizer(
        Optim(**zero, **scales), NESTED, epochs=3, steps_per_epoch=1, batch_size=1024
    )
    state, ones = tx.init(NESTED), jax.tree.map(jnp.ones_like, NESTED)
    assert float(schedule(0)) == float(schedule(4)) == 0
    for step in range(5):
        updates, state = tx.update(ones, state, NESTED)
        rate = float(schedule(step))
        np.testing.assert_allclose(updates["head"]["bias"], -rate, rtol=1e-4)
        np.testing.assert_allclose(updates["blocks"]["0"]["kernel"], -0.01 * rate, rtol=1e-4)


def test_layer_decay_multiplies_the_learning_rate_of_a_run(monkeypatch):
    monkeypatch.setattr(optax, "sgd", lambda rate, **_: optax.scale_by_learning_rate(rate))
    optim = Optim(name="sgd", weight_decay=0, base_batch_size=64, warmup_epochs=0, layer_decay=0.5)
    rates, schedule = run_rates(optim)
    for name, factor in (("0", 0.25), ("1", 0.5)):
        found = [rate["blocks"][name]["kernel"] for rate in rates]
        np.testing.assert_allclose(found, factor * np.array(schedule), rtol=1e-5)
    np.testing.assert_allclose([rate["head"]["bias"] for rate in rates], schedule, rtol=1e-5)


def test_decay_of_all_parameters():
    """As torch's optimizers decay without parameter groups."""
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "cls_token": jnp.ones((1, 1, 2))}
    every = optimizer.decay_mask(params, ())
    assert every == dict.fromkeys(params, True)
    assert optimizer.decay_mask(params, ("vectors",)) == {"kernel": True, "bias": False, "cls_token": True}
    optim = Optim(
        name="momentum", weight_decay=0.5, no_decay=(), learning_rate=0.1, base_batch_size=64, warmup_epochs=0
    )
    tx, _ = optimizer.run_optimizer(optim, params, epochs=3, steps_per_epoch=1, batch_size=64)
    after = descend(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    jax.tree.map(lambda x: np.testing.assert_allclose(x, 0.95, rtol=1e-6), after)


def test_the_optimizer_of_a_run_is_the_same_as_before():
    """The defaults give `make_optimizer`, with the same state."""
    optim = Optim(clip_norm=1.0)
    tx, schedule = optimizer.run_optimizer(optim, NESTED, epochs=300, steps_per_epoch=1, batch_size=1024)
    plain = optimizer.make_optimizer(NESTED, learning_rate=schedule, weight_decay=0.05, clip_norm=1.0)
    grads = [jax.tree.map(jnp.ones_like, NESTED)] * 3
    jax.tree.map(np.testing.assert_array_equal, descend(tx, NESTED, grads), descend(plain, NESTED, grads))
    assert jax.tree.structure(tx.init(NESTED)) == jax.tree.structure(plain.init(NESTED))


def test_lamb_as_deit_iii_uses_it():
    """By hand, one step: clipped at a norm of 1, and a trust ratio for matrices only.

    The published optimizer, FusedLAMB of apex, does not adapt parameters without weight decay, and clips the
    global norm of the gradient at 1. Without that, LayerScale, which starts at 1e-4, would hardly move.
    """
    params = {"kernel": jnp.full((2, 3), 0.5), "gamma": jnp.full((4,), 1e-4)}
    grads = {"kernel": jnp.arange(6.0).reshape(2, 3), "gamma": jnp.array([3.0, -4.0, 0.0, 1.0])}
    tx = optimizer.make_optimizer(params, name="lamb", learning_rate=0.1, weight_decay=0.2, clip_norm=1.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in grads.values()))
    adam = {k: np.asarray(g) / norm / (np.abs(np.asarray(g) / norm) + 1e-8) for k, g in grads.items()}
    kernel = adam["kernel"] + 0.2 * 0.5
    ratio = np.linalg.norm(np.full(6, 0.5)) / np.linalg.norm(kernel)
    np.testing.assert_allclose(updates["kernel"], -0.1 * ratio * kernel, rtol=1e-5)
    np.testing.assert_allclose(updates["gamma"], -0.1 * adam["gamma"], rtol=1e-5)
