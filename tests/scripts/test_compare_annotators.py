"""The comparison of annotators: which epochs are taken, the arms, the table, and what is not repeated."""

import json

import pytest

from scripts import compare_annotators as module

METRICS = [{"step": s, "eval/ema_top1": top1} for s, top1 in [(2, 30.0), (4, 58.0), (6, 81.5), (8, 94.0)]]


@pytest.fixture
def trained(monkeypatch):
    """The trainings, which are not made: (variant, changes, epochs)."""
    runs = []

    def run(variant, workdir, out, *, epochs=None, seed=0, changes=None, recipe=None):
        runs.append((variant, changes, epochs))
        return {"eval/ema_top1": 50.0 + len(runs), "eval/raw_top1": 50.0}

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "_annotate", lambda out, step, folder: None)
    monkeypatch.setattr(module, "read_metrics", lambda workdir: [{"step": 1, "train/loss": 1.0}, *METRICS])
    monkeypatch.setattr(module, "start_logging", lambda: None)
    monkeypatch.setattr(module.digit_scenes, "prepare", lambda folder, **options: None)
    return runs


def test_arms_and_resumption(tmp_path, trained, capsys):
    results = tmp_path / "results" / "a.jsonl"
    flags = [f"--out={tmp_path}", f"--results={results}", "--targets", "60", "95", "--epochs=3"]
    assert module.main(flags) == 0
    assert [name for name, *_ in trained] == ["annotator", *["token_labels"] * 4, "no_token_labels"]
    assert {(changes["data.score_maps"], changes["loss.cls_target"]) for _, changes, _ in trained[1:5]} == {
        (str(tmp_path / f"score_maps_{step}"), target) for step in (4, 8) for target in ("annotator", "label")
    }
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["annotator_top1"] for line in lines] == [58.0, 58.0, 94.0, 94.0, None]
    printed = capsys.readouterr().out
    assert "| none: image labels only |  | 56.0 |\n| 58.0 | 52.0 | 53.0 |\n| 94.0 | 54.0 | 55.0 |" in printed

    results.write_text("".join(json.dumps(line) + "\n" for line in lines[:3] + lines[4:]))
    trained.clear()
    assert module.main(flags) == 0
    assert [changes["loss.cls_target"] for _, changes, _ in trained[1:]] == ["label"]  # the missing one


def test_the_first_of_the_closest_steps_is_taken():
    accuracy = {2: 30.0, 4: 58.0, 6: 62.0, 8: 94.0}
    assert [module.closest_step(accuracy, target) for target in (0, 60, 63, 100)] == [2, 4, 6, 8]
