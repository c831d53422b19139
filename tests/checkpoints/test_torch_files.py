"""PyTorch files in every format, corrupt and malicious ones, and export."""

import argparse
import builtins
import dataclasses
import json
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from conftest import fill
from flax import nnx

import tlvit
from tlvit.checkpoints import torch_files
from tlvit.checkpoints.load import open_checkpoint
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.torch_names import from_torch, official_shapes, to_torch

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


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar", "a.pt"])
def test_pickles_of_both_formats(torch, tensors, tmp_path, legacy, name):
    path = tmp_path / name
    torch.save(as_torch(torch, tensors), path, _use_new_zipfile_serialization=not legacy)
    weights = torch_files.read_weights(path)
    assert weights.section == "top level of the file"
    check_equal(weights.tensors, tensors)


@pytest.mark.parametrize(
    ("sections", "weights", "section", "factor"),
    [
        ("state_dict", "auto", "state_dict", 1),
        ("model", "auto", "model", 1),
        ("state_dict state_dict_ema", "auto", "state_dict_ema", 2),
        ("state_dict state_dict_ema", "ema", "state_dict_ema", 2),
        ("state_dict state_dict_ema", "raw", "state_dict", 1),
        ("model model_ema", "auto", "model_ema", 2),
        ("model model_ema", "raw", "model", 1),
        ("state_dict_ema", "auto", "state_dict_ema", 2),
        ("net", "auto", "net", 1),  # T2T-ViT's files of CIFAR
        ("net", "raw", "net", 1),
        ("net model_ema", "auto", "model_ema", 2),
    ],
)
def test_sections(torch, tmp_path, sections, weights, section, factor):
    both = {True: 2.0, False: 1.0}
    content = {k: {"module.a": torch.full((2,), both[k.endswith("_ema")])} for k in sections.split()}
    options = argparse.Namespace(model="lvvit_s", lr=1e-3)
    torch.save(
        {"epoch": 3, "arch": "x", "args": options, "optimizer": {"state": {}}, **content}, tmp_path / "a.pth"
    )
    found = torch_files.read_weights(tmp_path / "a.pth", weights=weights)
    assert found.section == section
    check_equal(found.tensors, {"a": np.full(2, factor, np.float32)})


def test_missing_weights(torch, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 1}, tmp_path / "raw.pth")
    with pytest.raises(ValueError, match="has no EMA weights; its keys are state_dict, epoch"):
        torch_files.read_weights(tmp_path / "raw.pth", weights="ema")
    torch.save({"state_dict_ema": {"a": torch.ones(2)}}, tmp_path / "ema.pth")
    with pytest.raises(ValueError, match="has no raw weights; its keys are state_dict_ema"):
        torch_files.read_weights(tmp_path / "ema.pth", weights="raw")
    with pytest.raises(ValueError, match="weights must be one of auto, ema, raw, not 'best'"):
        torch_files.read_weights(tmp_path / "ema.pth", weights="best")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not a dict"):
        torch_files.read_weights(tmp_path / "list.pth")
    torch.save({"a": torch.ones(2), "module.a": torch.ones(2)}, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match="holds a twice"):
        torch_files.read_weights(tmp_path / "twice.pth")


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
def test_other_float_types_become_float32(torch, tmp_path, kind):
    safe = pytest.importorskip("safetensors.torch")
    exact = np.array([1.0, -2.5, 0.125], np.float32)
    tensor = torch.from_numpy(exact).to(getattr(torch, kind))
    torch.save({"a": tensor, "b": torch.nn.Parameter(tensor)}, tmp_path / "a.pth")
    safe.save_file({"a": tensor, "b": tensor.clone()}, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        check_equal(torch_files.read_weights(tmp_path / name).tensors, {"a": exact, "b": exact})


def test_safetensors_do_not_need_torch(tensors, tmp_path, monkeypatch):
    original = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name.split(".")[0] == "torch":
            raise ImportError("no torch")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    model, info = tlvit.load(tmp_path / "a.safetensors", model="lvvit_s", **TINY)
    check_equal(to_torch(model), tensors)
    assert (info.num_classes, info.image_size, info.preprocessing.crop_pct) == (5, (64, 64), 0.9)
    torch_files.export(model, tmp_path / "b.safetensors")
    check_equal(torch_files.read_weights(tmp_path / "b.safetensors").tensors, tensors)
    with pytest.raises(ImportError, match=r"pip install tlvit\[torch\]"):
        torch_files.export(model, tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes(b"PK\x03\x04...")
    with pytest.raises(ImportError, match=r"c.pth is a PyTorch pickle, .* pip install tlvit\[torch\]"):
        torch_files.read_weights(tmp_path / "c.pth")


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(torch, tensors, tmp_path, kind, fraction):
    complete, cut = tmp_path / "complete", tmp_path / "cut"
    if kind == "safetensors":
        safetensors.numpy.save_file(tensors, complete)
    else:
        torch.save(as_torch(torch, tensors), complete, _use_new_zipfile_serialization=kind == "zip")
    content = complete.read_bytes()
    cut.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(ValueError, match="cut is truncated or not a"):
        torch_files.read_weights(cut)


@pytest.mark.parametrize(
    "content", [b"", b"a", b"<!DOCTYPE html><html>", b"version https://git-lfs", bytes(range(64))]
)
def test_files_that_are_not_checkpoints(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.pth \\({len(content)} bytes.* is not a PyTorch checkpoint"):
        torch_files.read_weights(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError):
        torch_files.read_weights(tmp_path / "y.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "namespace"])
def test_malicious_pickles_execute_nothing(torch, tmp_path, kind):
    mark = tmp_path / "executed"
    record = {"state_dict": {"a": torch.ones(2)}, "x": Malicious(mark)}
    if kind == "namespace":
        record = {"state_dict": {"a": torch.ones(2)}, "args": argparse.Namespace(x=Malicious(mark))}
    path = tmp_path / "malicious.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(record["x"], protocol=2))
    else:
        torch.save(record, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(
        ValueError,
        match=r"malicious.pth is refused: it asks for (posix|nt|os).system. Nothing in it was executed",
    ):
        torch_files.read_weights(path)
    assert not mark.exists()


def test_pickled_modules_are_refused(torch, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"is refused: it asks for torch.nn.modules.linear.Linear"):
        torch_files.read_weights(tmp_path / "module.pth")


@pytest.mark.parametrize("name", ["out/x.safetensors", "x.pth", "x.pt", "x.pth.tar"])
def test_export_and_load_give_the_same_model(torch, tensors, tmp_path, name):
    model = INFO.build()
    from_torch(model, tensors)
    torch_files.export(model, tmp_path / name, info=INFO)
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [
        pathlib.Path(name).name
    ]  # nothing temporary left
    again, info = tlvit.load(tmp_path / name)
    assert info == INFO
    if name.endswith(".safetensors"):
        read = safetensors.numpy.load_file(tmp_path / name)
    else:
        read = {k: v.numpy() for k, v in torch.load(tmp_path / name, weights_only=True).items()}
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
        torch_files.export(INFO.build(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
    assert path.read_bytes() == b"old"
    with pytest.raises(ValueError, match=r"the ending must be one of \.safetensors, \.pth"):
        torch_files.export(INFO.build(), tmp_path / "x.bin")


def test_load_at_another_image_size(tensors, tmp_path):
    model = INFO.build()
    from_torch(model, tensors)
    torch_files.export(model, tmp_path / "x.safetensors", info=INFO)
    wide, info = tlvit.load(tmp_path / "x.safetensors", image_size=(96, 32), rule="mean")
    assert (info.image_size, wide.grid, wide.rule) == ((96, 32), (6, 2), "mean")
    torch_files.export(wide, tmp_path / "wide.safetensors", info=info)
    back, info = tlvit.load(tmp_path / "wide.safetensors", image_size=64)  # the header knows the grid
    assert info.image_size == (64, 64)
    assert to_torch(back)["pos_embed"].shape == (1, 17, 24)


def test_another_number_of_classes_needs_drop_heads(tensors, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors, path, {"tlvit": json.dumps(INFO.to_json())})
    with pytest.raises(ValueError, match="heads for 5 classes, not 7"):
        open_checkpoint(path, num_classes=7)
    opened = open_checkpoint(path, num_classes=7, drop_heads=True)
    assert (opened.info.num_classes, opened.info.class_names) == (7, None)
    heads = ["aux_head.bias", "aux_head.weight", "head.bias", "head.weight"]
    assert sorted(opened.report.reinitialized) == heads
    opened = open_checkpoint(path, drop_heads=True)  # new heads for the same number of classes
    assert not np.allclose(to_torch(opened.model)["head.weight"], tensors["head.weight"])


def test_headers_of_version_0_1_are_read(tensors, tmp_path):
    header = {
        k: v for k, v in INFO.to_json().items() if k not in ("options", "best_weights", "inference_rule")
    }
    header |= {"overrides": INFO.options, "preprocessing": {"crop_pct": 0.8}}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", {"tlvit": json.dumps(header)})
    model, info = tlvit.load(tmp_path / "x.safetensors")
    check_equal(to_torch(model), tensors)
    assert info == dataclasses.replace(INFO, preprocessing=Preprocessing(crop_pct=0.8))


def test_safetensors_are_recognized_whatever_the_length_of_their_header(tensors, tmp_path):
    """The first byte of the file is the lowest byte of that length; a pickle begins with 0x80."""
    seen = set()
    for length in range(0, 256, 8):
        path = tmp_path / f"{length}.safetensors"
        safetensors.numpy.save_file(tensors, path, {"padding": "x" * length})
        seen.add(path.read_bytes()[0])
        check_equal(torch_files.read_weights(path).tensors, tensors)
    assert seen == set(range(0, 256, 8))


# Files that are damaged, forged or too large.


def flip(path, position, bit=0x10):
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("with_info", [True, False])
def test_a_flipped_bit_in_an_exported_file_is_noticed(torch, tensors, tmp_path, name, with_info):
    """Anywhere in the values, and in the record of the model."""
    model = INFO.build()
    from_torch(model, tensors)
    torch_files.export(model, tmp_path / name, info=INFO if with_info else None)
    intact = (tmp_path / name).read_bytes()
    needles = [tensors[key].tobytes() for key in ("head.weight", "norm.bias", "patch_embed.bn1.running_var")]
    positions = [intact.index(needle) + 5 for needle in needles]
    if with_info:
        positions.append(intact.index(b"crop_pct") + len(b'crop_pct": 0.') + (2 if ".saf" in name else 0))
    for position in positions:
        (tmp_path / name).write_bytes(intact)
        flip(tmp_path / name, position, 0x01)
        with pytest.raises(ValueError, match=f"{name} is damaged or was changed: .* SHA-256"):
            torch_files.read_weights(tmp_path / name)
    (tmp_path / name).write_bytes(intact)
    check_equal(
        torch_files.read_weights(tmp_path / name).tensors, {k: np.float32(v) for k, v in tensors.items()}
    )


def test_a_pth_with_a_record_is_an_ordinary_state_dict_for_torch(torch, tensors, tmp_path):
    """Modules take it strictly; the record and the checksum are attributes that they do not look at."""
    model = INFO.build()
    from_torch(model, tensors)
    torch_files.export(model, tmp_path / "x.pth", info=INFO)
    state_dict = torch.load(tmp_path / "x.pth", weights_only=True)
    assert {type(value) for value in state_dict.values()} == {torch.Tensor}
    module = torch.nn.Module()
    for name in ("head", "aux_head"):
        setattr(module, name, torch.nn.Linear(24, 5))
    for name in [name for name in state_dict if "head" not in name]:
        del state_dict[name]
    module.load_state_dict(state_dict, strict=True)
    np.testing.assert_array_equal(module.head.weight.detach(), tensors["head.weight"])


def test_a_zip_bomb_is_refused_before_it_is_unpacked(torch, tmp_path):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    with pytest.raises(ValueError, match=r"bomb.pth is refused: its [\d,]+ bytes unpack to 4\d\d,\d\d\d"):
        torch_files.read_weights(tmp_path / "bomb.pth")
    assert torch_files.read_weights(tmp_path / "plain.pth").tensors["a"].shape == (100_000,)


def test_tensors_that_repeat_one_value_are_refused(torch, tmp_path):
    """A view with stride 0 has any number of values and is saved as one."""
    torch.save({"a": torch.zeros(1).half().expand(10**7, 10**5)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth is refused: its tensors have 1,000,000,000,000 values in"):
        torch_files.read_weights(tmp_path / "x.pth")


def test_complex_tensors_are_refused(torch, tmp_path):
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: a cannot become float32: is of type torch\.complex64"):
        torch_files.read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("record", ["[]", "{", '{"model": "lvvit_s"}', "null", ""])
def test_damaged_records_in_a_file(tensors, tmp_path, record):
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", {"tlvit": record})
    with pytest.raises(ValueError, match=r"The record of .*x\.safetensors"):
        torch_files.read_weights(tmp_path / "x.safetensors")


def test_the_model_of_another_family_is_named(tensors, tmp_path):
    shapes = official_shapes(nnx.eval_shape(ModelInfo("lvvit_t", 3, (32, 32)).build))
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(zeros, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors holds a lvvit_t, not a regnety_002"):
        tlvit.load(tmp_path / "x.safetensors", model="regnety_002")
    safetensors.numpy.save_file(tensors, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"own\.safetensors holds a lvvit, not a deit_tiny_patch16_224"):
        tlvit.load(tmp_path / "own.safetensors", model="deit_tiny_patch16_224")
    with pytest.raises(
        ValueError, match=r"(?s)tensors do not fit this LVViT:.*--model=lvvit_s --option=depth=12"
    ):
        tlvit.load(tmp_path / "own.safetensors", model="lvvit_s")
    own = {"dim": 16, "depth": 1, "num_heads": 2}
    shapes = official_shapes(nnx.eval_shape(ModelInfo("vit", 3, (32, 32), own).build))
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name != "pos_embed"}
    safetensors.numpy.save_file(zeros, tmp_path / "vit.safetensors")
    with pytest.raises(
        ValueError, match=r"do not fit this LVViT:\n  pos_embed: missing, wanted \[1, 5, 16\]"
    ):
        tlvit.load(tmp_path / "vit.safetensors", model="vit", image_size=(32, 32), **own)
    model = INFO.build()
    from_torch(model, tensors)
    torch_files.export(model, tmp_path / "recorded.safetensors", info=INFO)
    with pytest.raises(ValueError, match=r"recorded\.safetensors holds a lvvit_s, not a t2t_vit_7"):
        tlvit.load(tmp_path / "recorded.safetensors", model="t2t_vit_7")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tensors, tmp_path, value):
    wrong = {
        **tensors,
        "norm.weight": tensors["norm.weight"].copy(),
        "head.bias": np.full(5, value, np.float32),
    }
    wrong["norm.weight"][3:5] = value
    safetensors.numpy.save_file(wrong, tmp_path / "x.safetensors", {"tlvit": json.dumps(INFO.to_json())})
    with pytest.raises(
        ValueError, match=r"x\.safetensors is not usable: .*2 of 24 values of norm.weight"
    ) as caught:
        tlvit.load(tmp_path / "x.safetensors")
    assert "5 of 5 values of head.bias" in str(caught.value)
    wrong["norm.weight"] = tensors["norm.weight"]
    safetensors.numpy.save_file(wrong, tmp_path / "x.safetensors", {"tlvit": json.dumps(INFO.to_json())})
    opened = open_checkpoint(
        tmp_path / "x.safetensors", drop_heads=True
    )  # heads that are left out do not count
    assert "head.bias" in opened.report.reinitialized
