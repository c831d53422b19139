"""The comparison: what its arms share, which runs are repeated, and (slow) a complete run at small size."""

import json

import pytest

from configs import digits_small as recipe
from scripts import compare_token_labels as module
from scripts.comparison_table import BASELINE, read_lines
from tlvit.config import to_dict

TINY = {"patch_size": 8, "dim": 32, "depth": 1, "num_heads": 2, "stem_width": None, "rule": "class"}
TINY_ANNOTATOR = {"widths": (8,), "depths": (1,), "strides": (2,), "group_width": 8, "stem_width": 8}


def settings(arm, folder, seed=3):
    return to_dict(module.settings(arm, seed, folder))


def test_arms_differ_only_in_the_compared_settings(tmp_path):
    """Student, seed, data order, augmentation and optimizer are those of the baseline."""
    baseline = settings(BASELINE, tmp_path)
    assert baseline["seed"] == 3
    different = {
        "labels_mixed": {("augment", "mixup"), ("augment", "cutmix")},
        "labels_twice": {("epochs",)},
        "aligned": {("token_labels",), ("data", "score_maps")},
        "published_crop": {("token_labels",), ("data", "score_maps"), ("data", "label_crop")},
        "pooled": {
            ("token_labels",),
            ("data", "score_maps"),
            ("loss", "dense_weight"),
            ("loss", "cls_target"),
        },
        "aligned_no_mixtoken": {("token_labels",), ("data", "score_maps"), ("loss", "mixtoken")},
    }
    assert different.keys() | {BASELINE} == module.ARMS.keys() == module.NAMES.keys()
    for arm, expected in different.items():
        found = settings(arm, tmp_path)
        changed = {(k,) for k in found if not isinstance(found[k], dict) and found[k] != baseline[k]}
        changed |= {
            (k, name)
            for k in found
            if isinstance(found[k], dict)
            for name in found[k]
            if found[k][name] != baseline[k][name]
        }
        assert changed == expected, arm
    assert settings("labels_twice", tmp_path)["epochs"] == 2 * baseline["epochs"]


def test_the_hash_is_of_the_settings_without_seed_and_folders(tmp_path, monkeypatch):
    hashes = {arm: module.settings_hash(module.settings(arm, 0, tmp_path)) for arm in module.ARMS}
    assert len(set(hashes.values())) == len(module.ARMS)
    assert hashes["aligned"] == module.settings_hash(module.settings("aligned", 5, tmp_path / "other"))
    monkeypatch.setitem(recipe.SCENES, "num_train", 1)
    assert hashes["aligned"] != module.settings_hash(module.settings("aligned", 0, tmp_path))


@pytest.fixture
def trained(monkeypatch):
    """The trainings, which are not made: (arm, seed)."""
    runs = []

    def student(arm, seed, out):
        runs.append((arm, seed))
        top1 = 50.0 + len(runs) + seed * len(arm) / 10
        settings = module.settings_hash(module.settings(arm, seed, out))
        return {"arm": arm, "seed": seed, "settings": settings, "ema_top1": top1, "raw_top1": top1}

    monkeypatch.setattr(module, "student", student)
    monkeypatch.setattr(module, "prepare", lambda out: runs.append("prepare"))
    monkeypatch.setattr(module, "start_logging", lambda: None)
    return runs


def test_finished_runs_are_not_repeated(tmp_path, trained, capsys):
    results = tmp_path / "folder" / "r.jsonl"
    flags = [f"--out={tmp_path}", f"--results={results}"]
    assert module.main([*flags, "--seeds", "0", "1"]) == 0
    order = [(arm, seed) for seed in (0, 1) for arm in module.ARMS]
    assert trained == ["prepare", *order]
    assert f"| {module.NAMES['labels']} | 2 | 55.8 (52.0 to 59.6) |" in capsys.readouterr().out
    lines = results.read_text().splitlines()
    kept = [line for i, line in enumerate(lines) if i != 4]
    other = {**json.loads(lines[4]), "settings": "00000000"}  # of another recipe: it does not count
    results.write_text("\n".join([*kept, json.dumps(other)]) + "\n")
    trained.clear()
    assert module.main([*flags, "--seeds", "0", "1"]) == 0
    assert trained == ["prepare", order[4]]
    trained.clear()
    assert module.main([*flags, "--seeds"]) == 0  # only the table
    assert trained == []


@pytest.mark.slow
def test_a_complete_run(tmp_path, monkeypatch, capsys):
    original = recipe.get_config

    def get_config(variant="token_labels"):
        config = original(variant)
        config.epochs, config.optim.warmup_epochs = 1, 0.0
        config.model.options = TINY_ANNOTATOR if variant == "annotator" else TINY
        return config

    monkeypatch.setattr(recipe, "get_config", get_config)
    monkeypatch.setattr(recipe, "SCENES", {**recipe.SCENES, "num_train": 64, "num_test": 32})
    monkeypatch.setattr(recipe, "EPOCHS", 1)
    results = tmp_path / "r.jsonl"
    flags = [
        f"--out={tmp_path}",
        f"--results={results}",
        "--seeds",
        "4",
        "--arms",
        "labels",
        "published_crop",
    ]
    assert module.main(flags) == 0
    labels, published = read_lines(results)
    assert (labels["arm"], labels["seed"], labels["annotator_top1"]) == ("labels", 4, None)
    assert 0 <= published["annotator_top1"] <= 100
    assert published["curve"][-1] == [1.0, published["raw_top1"], published["ema_top1"]]
    assert published["versions"].keys() == set(module.LIBRARIES)
    config = json.loads(next(tmp_path.glob("published_crop_seed4_*/config.json")).read_text())
    assert (config["seed"], config["data"]["label_crop"]) == (4, "published")
    assert (
        f"| {module.NAMES['published_crop']} | 1 | {published['ema_top1']:.1f} |" in capsys.readouterr().out
    )
