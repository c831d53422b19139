"""A whole small training run of the published implementation, step by step."""

import json

import jax
import numpy as np
import optax
import pytest
from conftest import fill_model, golden_images, golden_target

import tlvit
from tlvit.checkpoints.torch_names import to_torch
from tlvit.models.functional import functionalize, update
from tlvit.ops import losses, mixing
from tlvit.training.optimizer import make_optimizer, update_ema
from tlvit.types import TokenTargets


@pytest.fixture(scope="module")
def published(golden):
    z = golden("trajectory_visible.npz")
    return {k: z[k] for k in z.files}


@pytest.fixture(scope="module")
def run(published):
    """(config, model, losses, (params, stats), ema) after all steps."""
    c = json.loads(str(published["config"]))
    model = tlvit.create_model(
        "lvvit_s", num_classes=c["C"], image_size=c["img_size"], dim=c["embed_dim"], depth=c["depth"],
        num_heads=c["num_heads"], skip_lam=c["skip_lam"],
    )  # fmt: skip
    fill_model(model)
    net, params, stats = functionalize(model)
    tokens = model.grid[0] * model.grid[1]
    rate = lambda step: c["lr"] * (step + 1) / c["steps"]
    tx = make_optimizer(params, learning_rate=rate, weight_decay=c["wd"])

    @jax.jit
    def step(params, stats, opt_state, ema, images, targets, mix):
        def loss_fn(params):
            output, new = net.apply(params, stats, images, mix=mix, train=True)
            return losses.token_label_loss(output, targets, mix, dense_weight=c["dense"]), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = update_ema(ema, {"params": params, "stats": new}, 0, decay=0.9)
        return loss, params, new, opt_state, ema

    opt_state, ema, seen = tx.init(params), {"params": params, "stats": stats}, []
    for i in range(c["steps"]):
        t = golden_target(c["seed"] + 200 + i, c["B"], c["C"], tokens)
        targets = TokenTargets(cls=t[:, :, 1], tokens=t[:, :, 2:].swapaxes(1, 2), label=t[:, :, 0])
        images = golden_images(c["seed"] + 100 + i, c["B"], c["img_size"])
        mix = mixing.mixtoken_mask_from_box(published["boxes"][i], model.grid)
        loss, params, stats, opt_state, ema = step(params, stats, opt_state, ema, images, targets, mix)
        seen.append(float(loss))
    return c, model, seen, (params, stats), (ema["params"], ema["stats"])


def test_losses(published, run):
    np.testing.assert_allclose(run[2], published["losses"], atol=1e-4)


def test_final_tensors(published, run):
    """Under their official names: whole where they are small, norm and first values where they are large."""
    _, model, _, final, _ = run
    update(model, *final)
    tensors = to_torch(model)
    seen = set()
    for key, expected in published.items():
        if not key.startswith("final/") or key.endswith("num_batches_tracked"):
            continue
        name, _, part = key.removeprefix("final/").partition("#")
        seen.add(name)
        got = tensors[name]
        if part == "l2":
            assert abs(np.linalg.norm(got.astype(np.float64)) / expected - 1) < 1e-5, name
            continue
        got = got.ravel()[: expected.size] if part == "head" else got
        assert got.shape == expected.shape, name
        assert np.abs(got - expected).max() < 1e-4 * max(np.abs(expected).max(), 1), name
    assert seen == {name for name in tensors if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(("which", "key"), [(3, "eval_logits"), (4, "ema_eval_logits")])
def test_evaluation_after_the_run(published, run, which, key):
    c, net = run[0], functionalize(run[1])[0]
    logits = net.apply(*run[which], golden_images(c["seed"] + 999, 4, c["img_size"]))[0].logits
    assert np.abs(logits - published[key]).max() / np.abs(published[key]).max() < 1e-4
