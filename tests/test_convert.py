"""The command `tlvit.convert`: both directions, its options and its errors."""

import json

import numpy as np
import pytest
import safetensors.numpy
from conftest import fill

import tlvit
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import Checkpoints
from tlvit.checkpoints.torch_names import from_torch, to_torch
from tlvit.convert import main

TINY = {"dim": 24, "depth": 2, "num_heads": 2, "stem_width": 8}
INFO = ModelInfo("lvvit_s", 5, (64, 64), TINY, class_names=("ant", "bee", "cat", "dog", "eel"))


@pytest.fixture(scope="module")
def tensors():
    """The tensors of a tiny LV-ViT, by the fill rule."""
    names = to_torch(INFO.build())
    return {k: v if v.dtype == np.int64 else fill(k, v.shape) for k, v in names.items()}


def check_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.slow
def test_pytorch_to_model_folder_and_back(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    model = tlvit.create_model("regnety_002", num_classes=2)
    names = {k: v if v.dtype == np.int64 else fill(k, v.shape) for k, v in to_torch(model).items()}
    as_torch = lambda scale: {k: torch.from_numpy(np.asarray(v * scale, v.dtype)) for k, v in names.items()}
    torch.save({"state_dict": as_torch(1), "state_dict_ema": as_torch(2)}, tmp_path / "a.pth")
    (tmp_path / "names.txt").write_text("no\nyes\n")
    folder, out = tmp_path / "folder", tmp_path / "b.pth"
    command = [
        f"--checkpoint={tmp_path / 'a.pth'}",
        "--model=regnety_002",
        f"--out={folder}",
        "--weights=raw",
    ]
    assert main([*command, f"--classes={tmp_path / 'names.txt'}"]) == 0
    printed = capsys.readouterr().out
    assert "state_dict -> regnety_002, 2 classes" in printed
    assert "reinitialized" in printed
    model, info = tlvit.load(folder)
    assert info.class_names == ("no", "yes")
    check_equal(to_torch(model), names)
    command = [f"--checkpoint={folder}", f"--out={out}"]
    assert main(command) == 0
    check_equal({k: v.numpy() for k, v in torch.load(out, weights_only=True).items()}, names)
    assert main([*command, "--to=pytorch"]) == 1  # never overwrites
    assert "b.pth exists already" in capsys.readouterr().err


def test_format_is_decided_by_the_ending_or_by_to(tensors, tmp_path, capsys):
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", {"tlvit": json.dumps(INFO.to_json())})
    command = [f"--checkpoint={tmp_path / 'a.safetensors'}"]
    assert main([*command, f"--out={tmp_path / 'b.safetensors'}"]) == 0
    assert (tmp_path / "b.safetensors").is_file()
    assert main([*command, f"--out={tmp_path / 'c.safetensors'}", "--to=tlvit"]) == 0
    assert (tmp_path / "c.safetensors").is_dir()
    for name in ("b.safetensors", "c.safetensors"):
        model, info = tlvit.load(tmp_path / name)
        check_equal(to_torch(model), tensors)
        assert info == INFO
    assert main([*command, f"--out={tmp_path / 'd'}", "--to=pytorch"]) == 1
    assert "the ending must be one of .safetensors" in capsys.readouterr().err


def test_differences_must_be_allowed(tensors, tmp_path, capsys):
    extra = {**tensors, "total_ops": np.zeros(1, np.float32)}
    safetensors.numpy.save_file(extra, tmp_path / "a.safetensors", {"tlvit": json.dumps(INFO.to_json())})
    folder = tmp_path / "folder"
    folder.mkdir()  # an empty folder may be used
    command = [f"--checkpoint={tmp_path / 'a.safetensors'}", f"--out={folder}"]
    assert main(command) == 1
    assert "total_ops: unexpected, [1]" in capsys.readouterr().err
    command += ["--allow=total_ops", "--heads=drop", "--num-classes=3", "--image-size=96x64"]
    assert main(command) == 0
    rows = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:5])
    wanted = {"loaded": len(tensors) - 3 - 4 - 1, "resized": 1, "reinitialized": 4, "unexpected": 1}
    assert rows == {k: str(v) for k, v in wanted.items()}  # the 3 num_batches_tracked are not counted
    model, info = tlvit.load(folder)
    assert (model.grid, info.num_classes, info.class_names) == ((6, 4), 3, None)


def test_workdir_to_model_folder_for_other_classes(tensors, tmp_path, capsys):
    model = INFO.build()
    from_torch(model, tensors)
    save_run(tmp_path / "run", model)
    command = [
        f"--checkpoint={tmp_path / 'run'}",
        f"--out={tmp_path / 'm'}",
        "--heads=drop",
        "--num-classes=3",
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "run: step 0, raw weights -> lvvit_s, 3 classes, 64x64 pixels" in printed
    assert "aux_head/bias" in printed
    found, info = tlvit.load(tmp_path / "m")
    assert (info.num_classes, found.head.kernel.shape) == (3, (24, 3))
    for name, array in to_torch(found).items():
        if "head" not in name:
            np.testing.assert_array_equal(array, tensors[name], err_msg=name)


def save_run(workdir, model):
    """A workdir with one checkpoint, of a run without EMA."""
    import optax

    from tlvit.models.functional import functionalize
    from tlvit.training.state import state_from

    _, params, stats = functionalize(model)
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(state_from(params, stats, optax.sgd(0.1), ema=False), extra=INFO.to_json())
    checkpoints.close()


def test_errors_are_reported(tmp_path, capsys):
    (tmp_path / "x.pth").write_bytes(b"nothing at all")
    assert main([f"--checkpoint={tmp_path / 'x.pth'}", f"--out={tmp_path / 'o'}"]) == 1
    assert "is not a PyTorch checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert main([f"--checkpoint={tmp_path / 'y.pth'}", f"--out={tmp_path / 'o'}"]) == 1
    assert "y.pth" in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "tlvit convert --checkpoint=weights.pth --model=lvvit_s --out=" in capsys.readouterr().out


def test_a_file_of_other_sizes_needs_its_options(tensors, tmp_path, capsys):
    safetensors.numpy.save_file(tensors, tmp_path / "own.safetensors")
    command = [f"--checkpoint={tmp_path / 'own.safetensors'}", "--model=lvvit_s", f"--out={tmp_path / 'm'}"]
    assert main(command) == 1
    assert "--option=depth=12" in capsys.readouterr().err
    options = [f"--option={name}={value}" for name, value in TINY.items()]
    assert main([*command, *options, "--option=rule=mean", "--option=remat=true"]) == 0
    model, info = tlvit.load(tmp_path / "m")
    check_equal(to_torch(model), tensors)
    assert info.options == {**TINY, "rule": "mean", "remat": True}
    with pytest.raises(SystemExit):
        main([*command, "--option=depth"])
    assert "'depth' is not NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--option=depht=3"], "lvvit_s has no option 'depht'; did you mean depth?"),
        (["--option=depth=-1"], "depth must be from 0 to 1000, not -1"),
        (["--model=t2t_vit_7"], "a.safetensors holds a lvvit_s, not a t2t_vit_7"),
    ],
)
def test_impossible_values_are_reported(tensors, tmp_path, capsys, arguments, message):
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", {"tlvit": json.dumps(INFO.to_json())})
    command = [f"--checkpoint={tmp_path / 'a.safetensors'}", f"--out={tmp_path / 'm'}"]
    assert main([*command, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-classes=0"], "must be an integer from 1 to 1000000, not '0'"),
        (["--num-classes=-3", "--heads=drop"], "must be an integer from 1 to 1000000, not '-3'"),
        (["--image-size=80000"], "An image size is at most 4096 pixels, not 80000."),
    ],
)
def test_impossible_arguments_are_usage_errors(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main([f"--checkpoint={tmp_path / 'a.safetensors'}", f"--out={tmp_path / 'm'}", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"a\nb\n", "has 2 class names for 5 classes"), (b"\xff\n", "is not UTF-8 text: byte 0 is invalid")],
)
def test_wrong_class_names_name_their_file(tensors, tmp_path, capsys, text, message):
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", {"tlvit": json.dumps(INFO.to_json())})
    (tmp_path / "names.txt").write_bytes(text)
    names = f"--classes={tmp_path / 'names.txt'}"
    assert main([f"--checkpoint={tmp_path / 'a.safetensors'}", f"--out={tmp_path / 'm'}", names]) == 1
    error = capsys.readouterr().err
    assert f"names.txt {message}" in error
