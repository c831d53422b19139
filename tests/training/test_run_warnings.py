"""Warnings at the start of a run."""

import pytest

from tlvit.config import Config, Data, Ema, Loss, Model, Optim
from tlvit.training.run_warnings import run_warnings

GOOD = {"epochs": 100, "cooldown_epochs": 0, "batch_size": 64, "ema": Ema(warmup=True),
        "optim": Optim(base_batch_size=64, learning_rate=1e-3)}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "images", "message"),
    [
        (
            {"epochs": 2},
            2000,
            "The warm-up takes 5 epochs and the run has 2, so the learning rate never reaches its peak of "
            "0.001. Try --config.optim.warmup_epochs=0.1.",
        ),
        (
            {"epochs": 8},
            2000,
            "The warm-up takes 5 of 8 epochs, so for most of the run the learning rate is below its peak of "
            "0.001. Try --config.optim.warmup_epochs=0.4.",
        ),
        (
            {"optim": Optim(min_lr=0)},
            2000,
            "The learning rate 0.0016 is given for a batch of 1024 and scaled to 0.0001 for 64 images. For "
            "0.0016 itself: --config.optim.base_batch_size=64.",
        ),
        (
            {},
            240,
            "An epoch of 240 images has 3 steps, and the whole run has 300. For more steps: "
            "--config.batch_size=24.",
        ),
        (
            {"ema": Ema(decay=0.99992)},
            2000,
            "After 3100 steps the average of the weights still has 78 % of the initial weights (ema.decay "
            "0.99992). Set --config.ema.warmup=True.",
        ),
    ],
)
def test_a_setting_that_learns_little(changes, images, message):
    assert run_warnings(Config(**{**GOOD, **changes}), images, images // 64) == [message]


def test_no_warning():
    assert run_warnings(Config(**GOOD), 2000, 31) == []
    assert run_warnings(Config(), 1_281_167, 1251) == []
    fine_tuning = {**GOOD, "ema": Ema(decay=0.99992), "model": Model(init_from="x")}
    assert run_warnings(Config(**fine_tuning), 2000, 31) == []


def test_a_token_head_that_nothing_trains():
    plain = {**GOOD, "token_labels": False, "loss": Loss(plain_labels=True)}
    (text,) = run_warnings(Config(model=Model(name="lvvit_s"), **plain), 2000, 31)
    assert text == (
        "Nothing trains the token head, but it counts in the logits (rule max). Set "
        "--config.model.options.rule=class, or --config.model.options.token_head=False."
    )
    for options in ({"rule": "class"}, {"token_head": False}):
        assert run_warnings(Config(model=Model(name="lvvit_s", options=options), **plain), 2000, 31) == []
    assert run_warnings(Config(model=Model(name="regnety_002"), **plain), 2000, 31) == []
    relabel = {**GOOD, "loss": Loss(dense_weight=0, mixtoken=False)}
    assert len(run_warnings(Config(model=Model(name="lvvit_s"), **relabel), 2000, 31)) == 1


def test_score_maps_from_which_nothing_learns():
    data = Data(score_maps="maps")
    labels = {**GOOD, "data": data, "loss": Loss(dense_weight=0, cls_target="label")}
    plain = Model(options={"token_head": False})
    (text,) = run_warnings(Config(model=plain, **labels), 2000, 31)
    assert text == (
        "Nothing learns from data.score_maps=maps: loss.dense_weight is 0 and loss.cls_target is label."
    )
    off = {**GOOD, "data": data, "token_labels": False, "loss": Loss(plain_labels=True)}
    (text,) = run_warnings(Config(model=plain, **off), 2000, 31)
    assert text == "Nothing learns from data.score_maps=maps: token_labels is off."
    assert run_warnings(Config(data=data, **GOOD), 2000, 31) == []


def test_the_remedy_for_a_warm_up_that_is_longer_than_a_run_in_steps_works():
    """A warm-up in steps needs a learning rate that is updated at every step."""
    settings = {**GOOD, "steps": 1000, "batch_size": 1024}
    (text,) = run_warnings(Config(**settings), 1_281_167, 1251)
    assert text.endswith("Try --config.optim.warmup_steps=50 --config.optim.schedule_unit=step.")
    optim = Optim(warmup_steps=50, schedule_unit="step")
    assert run_warnings(Config(**{**settings, "optim": optim}), 1_281_167, 1251) == []
    optim = Optim(warmup_steps=600, schedule_unit="step")
    (text,) = run_warnings(Config(**{**settings, "optim": optim}), 1_281_167, 1251)
    assert text.endswith("Try --config.optim.warmup_steps=50.")
