"""The demo: its commands, the export check and (slow) a complete run at small size."""

import json
import shlex

import pytest

from configs import digits_small as recipe
from scripts import demo
from scripts.comparison_table import read_lines
from tlvit.training.run_log import read_metrics

TINY = {"patch_size": 8, "dim": 32, "depth": 1, "num_heads": 2, "stem_width": None, "rule": "class"}
TINY_ANNOTATOR = {"widths": (8,), "depths": (1,), "strides": (2,), "group_width": 8, "stem_width": 8}


def test_commands_shown_are_commands_that_exist(tmp_path):
    """The flags of the printed commands set existing settings of the recipe."""
    text = demo.run_command("token_labels", tmp_path / "student")
    assert shlex.split(text) == [
        "python", "-m", "tlvit.main", "--config=configs/digits_small.py", f"--workdir={tmp_path}/student",
        f"--config.data.dir={tmp_path}/data", f"--config.data.score_maps={tmp_path}/score_maps",
        "--config.epochs=60",
    ]  # fmt: skip
    text = demo.run_command("annotator", tmp_path / "annotator")
    assert "--config=configs/digits_small.py:annotator " in text
    assert "score_maps" not in text
    flags = [a for a in shlex.split(demo.run_command("token_labels", tmp_path / "s")) if "--config." in a]
    config = recipe.get_config()
    for flag in flags:
        key, value = flag.removeprefix("--config.").split("=")
        config.update_from_flattened_dict({key: int(value) if value.isdecimal() else value})
    assert config.data.score_maps == f"{tmp_path}/score_maps"


def test_speed_is_the_median_of_the_progress_lines(tmp_path):
    rates = [{"step": i, "train/images_per_s": r} for i, r in enumerate([10.0, 500.0, 510.0])]
    lines = [*rates, {"step": 9, "eval/raw_top1": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert demo.speed(tmp_path) == 500.0
    assert demo.speed(tmp_path / "nothing") != demo.speed(tmp_path / "nothing")


def test_a_difference_in_the_class_token_shows_in_the_export_check(tmp_path, monkeypatch):
    """The check compares the logits of the inference rule, which the class token enters."""
    from tlvit.checkpoints import torch_files
    from tlvit.checkpoints.model_info import ModelInfo
    from tlvit.checkpoints.native import save_model_folder
    from tlvit.data.sources import digit_scenes

    info = ModelInfo("lvvit_s", 10, (48, 48), TINY)
    builder = digit_scenes.prepare(tmp_path / "data", num_train=1, num_test=32, num_shards=1)
    save_model_folder(tmp_path / "m", info.build(), info)
    export = torch_files.export

    def wrong(model, path, *, info):
        model.head.bias[...] = model.head.bias[...] + 5
        export(model, path, info=info)
        model.head.bias[...] = model.head.bias[...] - 5

    monkeypatch.setattr(torch_files, "export", wrong)
    assert demo.export(tmp_path / "m", tmp_path / "m.safetensors", builder) == pytest.approx(5, abs=1e-3)


def test_a_faithful_export_shows_no_difference(tmp_path):
    from tlvit.checkpoints.model_info import ModelInfo
    from tlvit.checkpoints.native import save_model_folder
    from tlvit.data.sources import digit_scenes

    info = ModelInfo("lvvit_s", 10, (48, 48), TINY)
    builder = digit_scenes.prepare(tmp_path / "data", num_train=1, num_test=32, num_shards=1)
    save_model_folder(tmp_path / "m", info.build(), info)
    assert demo.export(tmp_path / "m", tmp_path / "m.safetensors", builder) == 0.0


def test_the_stored_curve_is_that_of_the_results(tmp_path):
    line = next(r for r in read_lines(demo.STORED) if (r["arm"], r["seed"]) == (demo.STORED_ARM, 0))
    metrics = read_metrics(demo.stored_baseline(tmp_path / "stored"))
    assert [m["train/epoch"] for m in metrics] == [epoch for epoch, _, _ in line["curve"]]
    assert (metrics[-1]["eval/ema_top1"], metrics[-1]["eval/raw_top1"]) == (
        line["ema"],
        line["raw"],
    )


@pytest.fixture
def small(monkeypatch):
    """The recipe with smaller models and fewer scenes."""
    original = recipe.get_config

    def get_config(variant="token_labels"):
        config = original(variant)
        config.model.options = dict(TINY_ANNOTATOR if variant == "annotator" else TINY)
        return config

    monkeypatch.setattr(recipe, "get_config", get_config)
    monkeypatch.setattr(recipe, "SCENES", {**recipe.SCENES, "num_train": 128, "num_test": 64})


@pytest.mark.slow
def test_the_demo_from_beginning_to_end(small, tmp_path, capsys):
    assert demo.main([f"--out={tmp_path}", "--epochs=1"]) == 0
    text = capsys.readouterr().out
    assert "128 for training, 64 for testing" in text
    for part in (
        "annotator, top-1 ",
        "student, top-1 (averaged weights) ",
        "largest difference ",
        "images/s",
    ):
        assert part in text
    assert (tmp_path / "report.png").stat().st_size > 20_000
    assert (tmp_path / "student.safetensors").exists()
    assert (tmp_path / "score_maps" / "score_maps.json").exists()
    assert demo.main([f"--out={tmp_path}", "--epochs=1"]) == 0  # the second time, existing results are used
    assert "again" not in capsys.readouterr().err
