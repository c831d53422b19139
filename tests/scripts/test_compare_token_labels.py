"""The comparison: what its arms share, which runs are repeated, and (slow) complete runs at small size."""

import json

import pytest

from configs import digits_segmentation, digits_small
from scripts import compare_token_labels as module
from scripts.comparison_arms import ARMS, STUDIES
from scripts.comparison_table import read_lines
from tlvit.config import to_dict

TINY = {"patch_size": 8, "dim": 32, "depth": 1, "num_heads": 2, "stem_width": None}
TINY_ANNOTATOR = {"widths": (8,), "depths": (1,), "strides": (2,), "group_width": 8, "stem_width": 8}
MAPS = {("token_labels",), ("data", "score_maps")}


def settings(arm, folder, seed=3):
    return to_dict(module.settings(arm, seed, folder))


def differences(found, other):
    """(section, name) of the settings that differ, (name,) of those without a section."""
    changed = {(k,) for k in found if not isinstance(found[k], dict) and found[k] != other[k]}
    sections = (k for k in found if isinstance(found[k], dict))
    return changed | {(k, name) for k in sections for name in found[k] if found[k][name] != other[k][name]}


@pytest.mark.parametrize(
    ("arm", "baseline", "expected"),
    [
        ("labels_mixed", "labels", {("augment", "mixup"), ("augment", "cutmix")}),
        ("labels_twice", "labels", {("epochs",)}),
        ("aligned", "labels", MAPS),
        ("published_crop", "labels", {*MAPS, ("data", "label_crop")}),
        ("pooled", "labels", {*MAPS, ("loss", "dense_weight"), ("loss", "cls_target")}),
        ("no_mixtoken", "aligned", {("loss", "mixtoken")}),
        ("dense_half", "aligned", {("loss", "dense_weight")}),
        ("cls_annotator", "aligned", {("loss", "cls_target")}),
        ("annotator_60_label", "aligned", {("data", "score_maps")}),
        ("annotator_60_annotator", "cls_annotator", {("data", "score_maps")}),
        ("batchnorm_quarter", "aligned", {("optim", "accumulate")}),
        ("large_antialias", "large_fast", {("augment", "antialias")}),
        ("randaugment_bicubic", "randaugment_bilinear", {("augment", "randaugment_interpolation")}),
        ("deit_tokens", "deit_labels", {*MAPS, ("model", "options")}),
        ("deit_distilled", "deit_labels", {("model", "name"), ("distill", "teacher")}),
        ("t2t_transformer_labels", "t2t_performer_labels", {("model", "name")}),
        ("segment_aligned", "segment_scratch", {("model", "init_from")}),
        ("segment_aligned_frozen", "segment_aligned", {("optim", "lr_scale")}),
    ],
)
def test_arms_differ_only_in_the_compared_settings(tmp_path, arm, baseline, expected):
    """Student, seed, data order, augmentation and optimizer are those of the other arm."""
    found, other = settings(arm, tmp_path), settings(baseline, tmp_path)
    assert found["seed"] == other["seed"] == 3
    assert differences(found, other) == expected


def test_token_labels_of_another_family_add_only_the_token_head(tmp_path):
    without = settings("deit_labels", tmp_path)["model"]["options"]
    assert settings("deit_tokens", tmp_path)["model"]["options"] == {**without, "token_head": True}


def test_studies_name_arms_that_exist():
    for name, study in STUDIES.items():
        arms = set(study.arms) | set(filter(None, study.arms.values()))
        assert arms <= ARMS.keys(), name
    assert {arm for study in STUDIES.values() for arm in study.arms} == ARMS.keys()
    assert all(how.start in ARMS for how in ARMS.values() if how.start)


def test_the_hash_is_of_the_settings_without_seed_and_folders(monkeypatch):
    hashes = {arm: module.settings_hash(arm) for arm in ARMS}
    assert len(set(hashes.values())) == len(ARMS)
    with monkeypatch.context() as patch:
        patch.setitem(digits_small.SCENES, "num_train", 1)
        assert all(hashes[arm] != module.settings_hash(arm) for arm in ARMS)
    recipe = digits_small.get_config

    def other_student(variant="token_labels"):
        config = recipe(variant)
        config.epochs += variant == "no_token_labels"
        return config

    monkeypatch.setattr(digits_small, "get_config", other_student)
    changed = {arm for arm in ARMS if hashes[arm] != module.settings_hash(arm)}
    assert {"labels", "labels_mixed", "segment_labels"} <= changed  # the last one starts from the first
    assert not {"aligned", "segment_scratch", "segment_aligned"} & changed


def test_the_annotator_is_stopped_at_the_epoch_that_is_closest():
    accuracy = {62: 30.0, 124: 58.0, 186: 62.0, 248: 94.0}
    assert [module.closest_step(accuracy, target) for target in (10, 60, 79, 99)] == [62, 124, 248, 248]


@pytest.fixture
def trained(monkeypatch):
    """The trainings, which are not made: (arm, seed)."""
    runs = []

    def student(arm, seed, out):
        runs.append((arm, seed))
        top1 = 50.0 + len(runs) + seed * len(arm) / 10
        return {"arm": arm, "seed": seed, "settings": module.settings_hash(arm), "ema": top1, "raw": top1}

    monkeypatch.setattr(module, "student", student)
    monkeypatch.setattr(module, "start_logging", lambda: None)
    return runs


def test_finished_runs_are_not_repeated(tmp_path, trained, capsys):
    results = tmp_path / "folder" / "r.jsonl"
    flags = [f"--out={tmp_path}", f"--results={results}", "--studies", "main"]
    assert module.main([*flags, "--seeds", "0", "1"]) == 0
    order = [(arm, seed) for seed in (0, 1) for arm in STUDIES["main"].arms]
    assert trained == order
    assert f"| {ARMS['labels'].words} | 2 | 53.8 (51.0 to 56.6) |" in capsys.readouterr().out
    lines = results.read_text().splitlines()
    kept = [line for i, line in enumerate(lines) if i != 4]
    other = {**json.loads(lines[4]), "settings": "00000000"}  # of another recipe: it does not count
    results.write_text("\n".join([*kept, json.dumps(other)]) + "\n")
    trained.clear()
    assert module.main([*flags, "--seeds", "0", "1"]) == 0
    assert trained == [order[4]]
    trained.clear()
    assert module.main([*flags, "--seeds"]) == 0  # only the table
    assert trained == []


def test_a_study_also_trains_what_its_arms_start_from(tmp_path, trained):
    flags = [f"--out={tmp_path}", f"--results={tmp_path}/r.jsonl", "--studies", "segmentation"]
    assert module.main([*flags, "--seeds", "2"]) == 0
    names = [arm for arm, _ in trained]
    assert names.index("labels") < names.index("segment_labels") < names.index("segment_labels_frozen")
    assert set(names) == {*STUDIES["segmentation"].arms, "labels", "aligned"}
    trained.clear()
    assert module.main([*flags, "--seeds", "0", "--arms", "segment_scratch"]) == 0
    assert trained == [("segment_scratch", 0)]


@pytest.fixture
def tiny(monkeypatch):
    """The recipes with tiny models, 64 scenes and one epoch or four steps."""
    student, segmenter = digits_small.get_config, digits_segmentation.get_config

    def get_config(variant="token_labels"):
        config = student(variant)
        config.epochs, config.optim.warmup_epochs = 2 if variant == "annotator" else 1, 0.0
        config.model.options.update(TINY_ANNOTATOR if variant == "annotator" else TINY)
        return config

    def get_segmenter():
        config = segmenter()
        config.steps, config.optim.warmup_steps, config.eval.batch_size = 4, 1, 32
        config.model.options.update(TINY, channels=8)
        return config

    monkeypatch.setattr(digits_small, "get_config", get_config)
    monkeypatch.setattr(digits_segmentation, "get_config", get_segmenter)
    for name, value in {"num_train": 64, "num_test": 32}.items():
        monkeypatch.setitem(digits_small.SCENES, name, value)
    module._annotator_accuracies.cache_clear()


@pytest.mark.slow
def test_complete_runs(tmp_path, tiny, capsys):
    results = tmp_path / "r.jsonl"
    flags = [f"--out={tmp_path}", f"--results={results}", "--seeds", "4", "--studies"]
    arms = ["labels", "published_crop", "annotator_60_label", "large_fast"]
    assert module.main([*flags, "main", "annotators", "input", "--arms", *arms]) == 0
    labels, published, stopped, large = read_lines(results)
    assert (labels["arm"], labels["seed"], labels["annotator_top1"]) == ("labels", 4, None)
    assert 0 <= published["annotator_top1"] <= 100
    assert published["curve"][-1] == [1.0, published["raw"], published["ema"]]
    assert published["versions"].keys() == set(module.LIBRARIES)
    run = module.workdir("published_crop", 4, tmp_path)
    config = json.loads((run / "config.json").read_text())
    assert (config["seed"], config["data"]["label_crop"]) == (4, "published")
    accuracies = module._annotator_accuracies(tmp_path)
    assert len(accuracies) == 2  # of every epoch
    assert stopped["annotator_top1"] == accuracies[module.closest_step(accuracies, 60)]
    assert (tmp_path / "score_maps_24_stopped60").is_dir()
    assert (tmp_path / "score_maps_72").is_dir()
    assert large["annotator_top1"] == published["annotator_top1"] == accuracies[max(accuracies)]


@pytest.mark.slow
def test_a_segmenter_starts_from_the_student_of_its_seed(tmp_path, tiny):
    results = tmp_path / "r.jsonl"
    flags = [f"--out={tmp_path}", f"--results={results}", "--seeds", "1", "--studies", "segmentation"]
    assert module.main([*flags, "--arms", "labels", "segment_labels_frozen"]) == 0
    student, segmenter = read_lines(results)
    assert (student["score"], segmenter["score"]) == ("top1", "miou")
    assert segmenter["curve"][-1][1:] == [segmenter["raw"], segmenter["ema"]]
    config = json.loads((module.workdir("segment_labels_frozen", 1, tmp_path) / "config.json").read_text())
    assert config["model"]["init_from"] == str(module.workdir("labels", 1, tmp_path))
