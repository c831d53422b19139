"""tlvit.convert: files of PyTorch in every format, broken and hostile ones, export, and the command."""

import argparse
import builtins
import json
import os
import pathlib
import pickle

import numpy as np
import pytest
import safetensors.numpy
from conftest import fill

import tlvit
from tlvit.checkpoints import torch_files as convert
from tlvit.checkpoints.load import open_weights
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.torch_names import from_torch, to_torch
from tlvit.convert import main

TINY = {"dim": 24, "depth": 2, "num_heads": 2, "stem_width": 8}
INFO = ModelInfo("lvvit_s", 5, (64, 64), TINY, class_names=("ant", "bee", "cat", "dog", "eel"))


@pytest.fixture(scope="module")
def tensors():
    """A tiny LV-ViT's, by the fill rule."""
    names = to_torch(INFO.build())
    return {k: v if v.dtype == np.int64 else fill(k, v.shape) for k, v in names.items()}


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def as_torch(torch, tensors, scale=1):
    return {k: torch.from_numpy(np.asarray(v * scale, v.dtype)) for k, v in tensors.items()}


def check_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


class Evil:
    """A pickle that would write a file where it is read freely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar", "a.pt"])
def test_pickles_of_both_formats(torch, tensors, tmp_path, legacy, name):
    path = tmp_path / name
    torch.save(as_torch(torch, tensors), path, _use_new_zipfile_serialization=not legacy)
    weights = convert.read_weights(path)
    assert weights.section == "top level"
    check_equal(weights.tensors, tensors)


@pytest.mark.parametrize(
    ("record", "ema", "section", "factor"),
    [
        ("state_dict", None, "state_dict", 1),
        ("model", None, "model", 1),
        ("state_dict state_dict_ema", None, "state_dict_ema", 2),
        ("state_dict state_dict_ema", True, "state_dict_ema", 2),
        ("state_dict state_dict_ema", False, "state_dict", 1),
        ("model model_ema", None, "model_ema", 2),
        ("model model_ema", False, "model", 1),
        ("state_dict_ema", None, "state_dict_ema", 2),
    ],
)
def test_sections(torch, tmp_path, record, ema, section, factor):
    both = {True: 2.0, False: 1.0}
    content = {k: {"module.a": torch.full((2,), both[k.endswith("_ema")])} for k in record.split()}
    options = argparse.Namespace(model="lvvit_s", lr=1e-3)
    torch.save(
        {"epoch": 3, "arch": "x", "args": options, "optimizer": {"state": {}}, **content}, tmp_path / "a.pth"
    )
    weights = convert.read_weights(tmp_path / "a.pth", ema=ema)
    assert weights.section == section
    check_equal(weights.tensors, {"a": np.full(2, factor, np.float32)})


def test_weights_that_are_not_there(torch, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 1}, tmp_path / "raw.pth")
    with pytest.raises(ValueError, match="has no EMA weights; its keys are state_dict, epoch"):
        convert.read_weights(tmp_path / "raw.pth", ema=True)
    torch.save({"state_dict_ema": {"a": torch.ones(2)}}, tmp_path / "ema.pth")
    with pytest.raises(ValueError, match="has no weights; its keys are state_dict_ema"):
        convert.read_weights(tmp_path / "ema.pth", ema=False)
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not a dict"):
        convert.read_weights(tmp_path / "list.pth")
    torch.save({"a": torch.ones(2), "module.a": torch.ones(2)}, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match="holds a twice"):
        convert.read_weights(tmp_path / "twice.pth")


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
def test_other_float_types_become_float32(torch, tmp_path, kind):
    safe = pytest.importorskip("safetensors.torch")
    exact = np.array([1.0, -2.5, 0.125], np.float32)
    tensor = torch.from_numpy(exact).to(getattr(torch, kind))
    torch.save({"a": tensor, "b": torch.nn.Parameter(tensor)}, tmp_path / "a.pth")
    safe.save_file({"a": tensor, "b": tensor.clone()}, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        check_equal(convert.read_weights(tmp_path / name).tensors, {"a": exact, "b": exact})


def test_safetensors_go_without_torch(tensors, tmp_path, monkeypatch):
    real = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name.split(".")[0] == "torch":
            raise ImportError("no torch")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    model, info = tlvit.load(tmp_path / "a.safetensors", model="lvvit_s", **TINY)
    check_equal(to_torch(model), tensors)
    assert (info.num_classes, info.image_size, info.preprocessing.crop_pct) == (5, (64, 64), 0.9)
    convert.export(model, tmp_path / "b.safetensors")
    check_equal(convert.read_weights(tmp_path / "b.safetensors").tensors, tensors)
    with pytest.raises(ImportError, match=r"pip install tlvit\[torch\]"):
        convert.export(model, tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ImportError, match=r"c.pth is a PyTorch pickle, .* pip install tlvit\[torch\]"):
        convert.read_weights(tmp_path / "c.pth")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(torch, tensors, tmp_path, kind, share):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    if kind == "safetensors":
        safetensors.numpy.save_file(tensors, whole)
    else:
        torch.save(as_torch(torch, tensors), whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="cut is truncated or no"):
        convert.read_weights(cut)


@pytest.mark.parametrize(
    "content", [b"", b"a", b"<!DOCTYPE html><html>", b"version https://git-lfs", bytes(range(64))]
)
def test_files_that_are_no_checkpoints(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.pth \\({len(content)} bytes.* is no PyTorch checkpoint"):
        convert.read_weights(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError):
        convert.read_weights(tmp_path / "y.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "namespace"])
def test_hostile_pickles_execute_nothing(torch, tmp_path, kind):
    mark = tmp_path / "executed"
    record = {"state_dict": {"a": torch.ones(2)}, "x": Evil(mark)}
    if kind == "namespace":
        record = {"state_dict": {"a": torch.ones(2)}, "args": argparse.Namespace(x=Evil(mark))}
    path = tmp_path / "evil.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(record["x"], protocol=2))
    else:
        torch.save(record, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(
        ValueError, match=r"evil.pth is refused: it asks for (posix|nt|os).system. Nothing in it was executed"
    ):
        convert.read_weights(path)
    assert not mark.exists()


def test_whole_modules_are_refused(torch, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"is refused: it asks for torch.nn.modules.linear.Linear"):
        convert.read_weights(tmp_path / "module.pth")


@pytest.mark.parametrize("name", ["out/x.safetensors", "x.pth", "x.pt", "x.pth.tar"])
def test_export_and_load_give_the_same_model(torch, tensors, tmp_path, name):
    model = INFO.build()
    from_torch(model, tensors)
    convert.export(model, tmp_path / name, info=INFO)
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [
        pathlib.Path(name).name
    ]  # nothing temporary left
    if name.endswith(".safetensors"):
        read = safetensors.numpy.load_file(tmp_path / name)
        again, info = tlvit.load(tmp_path / name)
        assert info == INFO
    else:
        read = {k: v.numpy() for k, v in torch.load(tmp_path / name, weights_only=True).items()}
        again, _ = tlvit.load(tmp_path / name, model="lvvit_s", **TINY)
    check_equal(read, tensors)
    check_equal(to_torch(again), tensors)


def test_a_failed_export_leaves_the_old_file(torch, tensors, tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.write_bytes(b"old")

    def fail(_, file):
        pathlib.Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        convert.export(INFO.build(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
    assert path.read_bytes() == b"old"
    with pytest.raises(ValueError, match="the ending must be"):
        convert.export(INFO.build(), tmp_path / "x.bin")


def test_load_at_another_image_size(tensors, tmp_path):
    model = INFO.build()
    from_torch(model, tensors)
    convert.export(model, tmp_path / "x.safetensors", info=INFO)
    wide, info = tlvit.load(tmp_path / "x.safetensors", image_size=(96, 32), rule="mean")
    assert (info.image_size, wide.grid, wide.rule) == ((96, 32), (6, 2), "mean")
    convert.export(wide, tmp_path / "wide.safetensors", info=info)
    back, info = tlvit.load(tmp_path / "wide.safetensors", image_size=64)  # the header knows the grid
    assert info.image_size == (64, 64)
    assert to_torch(back)["pos_embed"].shape == (1, 17, 24)


def test_other_classes_are_asked_for(tensors):
    weights = convert.Weights(tensors, "top level", INFO)
    with pytest.raises(ValueError, match="heads for 5 classes, not 7"):
        open_weights(weights, num_classes=7)
    _, info, report = open_weights(weights, num_classes=7, drop_heads=True)
    assert (info.num_classes, info.class_names) == (7, None)
    assert sorted(report.reinitialized) == ["aux_head.bias", "aux_head.weight", "head.bias", "head.weight"]
    model, _, report = open_weights(weights, drop_heads=True)  # the same count, yet new
    assert not np.allclose(to_torch(model)["head.weight"], tensors["head.weight"])


def test_command_there_and_back(torch, tensors, tmp_path, capsys):
    pytest.importorskip("tlvit.checkpoints")
    names = {k: np.resize(v, s) for k, v, s in _small_regnet()}
    torch.save(
        {"state_dict": as_torch(torch, names), "state_dict_ema": as_torch(torch, names, 2)},
        tmp_path / "a.pth",
    )
    (tmp_path / "names.txt").write_text("no\nyes\n")
    folder, out = str(tmp_path / "folder"), str(tmp_path / "b.pth")
    command = [str(tmp_path / "a.pth"), "--model=regnety_002", f"--out={folder}", "--weights=raw"]
    assert main([*command, f"--class-names={tmp_path / 'names.txt'}"]) == 0
    printed = capsys.readouterr().out
    assert "state_dict -> regnety_002, 2 classes" in printed
    assert "reinitialized" in printed
    model, info = tlvit.load(folder)
    assert info.class_names == ("no", "yes")
    check_equal(to_torch(model), {k: v for k, v in names.items()})
    assert main([folder, "--to=pytorch", f"--out={out}"]) == 0
    check_equal({k: v.numpy() for k, v in torch.load(out, weights_only=True).items()}, names)
    assert main([folder, "--to=pytorch", f"--out={out}"]) == 1  # never overwrites
    assert "b.pth exists already" in capsys.readouterr().err


def test_command_asks_for_what_differs(tensors, tmp_path, capsys):
    extra = {**tensors, "total_ops": np.zeros(1, np.float32)}
    safetensors.numpy.save_file(extra, tmp_path / "a.safetensors", {"tlvit": json.dumps(INFO.to_json())})
    folder = tmp_path / "folder"
    folder.mkdir()  # empty: no harm in using it
    command = [str(tmp_path / "a.safetensors"), f"--out={folder}"]
    assert main(command) == 1
    assert "total_ops: unexpected, [1]" in capsys.readouterr().err
    command += ["--allow=total_ops", "--heads=drop", "--num-classes=3", "--image-size=96x64"]
    assert main(command) == 0
    rows = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:5])
    wanted = {"loaded": len(tensors) - 3 - 4 - 1, "resized": 1, "reinitialized": 4, "unexpected": 1}
    assert rows == {k: str(v) for k, v in wanted.items()}  # 3 num_batches_tracked are nobody's
    model, info = tlvit.load(folder)
    assert (model.grid, info.num_classes, info.class_names) == ((6, 4), 3, None)


def test_command_reports_errors(tmp_path, capsys):
    (tmp_path / "x.pth").write_bytes(b"nothing at all")
    assert main([str(tmp_path / "x.pth"), f"--out={tmp_path / 'o'}"]) == 1
    assert "is no PyTorch checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert main([str(tmp_path / "y.pth"), f"--out={tmp_path / 'o'}"]) == 1
    assert "y.pth" in capsys.readouterr().err


def _small_regnet():
    model = tlvit.create_model("regnety_002", num_classes=2)
    for name, array in to_torch(model).items():
        yield name, array if array.dtype == np.int64 else fill(name, array.shape), array.shape
