"""tlvit export: programs compute what the model computes, in processes that cannot import tlvit."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import tlvit
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.native import save_model_folder
from tlvit.checkpoints.program import inference
from tlvit.export import main

WITHOUT_TLVIT = (
    "import runpy, sys; sys.modules['tlvit'] = None; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model folder of a T2T-ViT with mean, std and crop of its own, and two photos, one of them oblong."""
    folder = tmp_path_factory.mktemp("export")
    info = ModelInfo(
        "t2t_vit_7", 3, (32, 32), {"dim": 16, "depth": 1, "num_heads": 2}, class_names=("ant", "bee", "cat"),
        preprocessing=Preprocessing((0.2, 0.4, 0.6), (0.1, 0.2, 0.4), crop_pct=0.8, interpolation="bilinear"),
    )  # fmt: skip
    model = info.build()
    model.head.kernel[...] *= 20  # probabilities that differ
    save_model_folder(folder / "model", model, info)
    rng = np.random.RandomState(0)
    for name, size in (("a", (40, 60)), ("b", (64, 37))):
        pixels = np.kron(rng.randint(0, 256, (*size, 3)) // 8 * 8, np.ones((2, 2, 1)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}.png")
    return folder


def run_example(folder, checkpoint):
    """(class, probability) of the two photos by the example that was written."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "XLA_FLAGS"))}
    photos = [str(checkpoint / f"{name}.png") for name in "ab"]
    command = [sys.executable, "-P", "-c", WITHOUT_TLVIT, str(folder / "example.py"), *photos]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, cwd=checkpoint, check=False)
    assert done.returncode == 0, done.stderr
    return [(name, float(p)) for name, p in re.findall(r"png: (\w+) ([\d.]+)", done.stdout)]


def check(kind, checkpoint, tmp_path, capfd):
    out = tmp_path / "out"
    assert main([f"--checkpoint={checkpoint / 'model'}", f"--out={out}", f"--to={kind}"]) == 0
    assert "t2t_vit_7, 3 classes, 32x32 pixels" in capfd.readouterr().out
    model, info = tlvit.load(checkpoint / "model")
    photos = [checkpoint / f"{name}.png" for name in "ab"]
    expected = [p.top[0] for p in tlvit.predict(model, info, photos, top=1)]
    found = run_example(out, checkpoint)
    assert [name for name, _ in found] == [score.name for score in expected]
    np.testing.assert_allclose([p for _, p in found], [s.probability for s in expected], atol=2e-4)
    assert not [path for path in tmp_path.iterdir() if path != out]
    return json.loads((out / "model.json").read_text())


def test_stablehlo_runs_without_tlvit(checkpoint, tmp_path, capfd):
    """Resize, crop and normalization included, for any number of images."""
    record = check("stablehlo", checkpoint, tmp_path, capfd)
    assert record["platforms"] == ["cpu", "cuda", "tpu"]
    assert record["class_names"] == ["ant", "bee", "cat"]
    assert (record["crop_pct"], record["interpolation"], record["image_size"]) == (0.8, "bilinear", [32, 32])


@pytest.mark.slow
def test_a_saved_model_runs_without_tlvit(checkpoint, tmp_path, capfd):
    record = check("savedmodel", checkpoint, tmp_path, capfd)
    assert record["signature"] == "serving_default"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stablehlo", "savedmodel"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lvvit_s", {"dim": 16, "depth": 2, "num_heads": 2, "stem_width": 4, "attention": "fused"}),
        ("lvvit_t", {"dim": 16, "depth": 2, "num_heads": 2, "stem_width": 4, "scan_blocks": True}),
        ("deit_tiny_distilled_patch16_224", {"dim": 16, "depth": 1, "num_heads": 2}),
        ("regnety_002", {}),
    ],
)
def test_every_family_is_exported(name, options, kind, tmp_path, capfd):
    """Export compares the probabilities itself."""
    info = ModelInfo(name, 3, (32, 32), options)
    save_model_folder(tmp_path / "model", info.build(), info)
    assert main([f"--checkpoint={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", f"--to={kind}"]) == 0


def test_automatic_attention_is_exported_from_a_gpu(tmp_path, monkeypatch, capfd):
    """There, automatic attention is cuDNN's, which other platforms do not have."""
    options = {"dim": 16, "depth": 1, "num_heads": 2, "stem_width": 4, "attention": "auto"}
    info = ModelInfo("lvvit_s", 3, (32, 32), {**options, "dtype": "bfloat16"})
    save_model_folder(tmp_path / "model", info.build(), info)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    flags = [f"--checkpoint={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", "--platforms=cpu,cuda,tpu"]
    assert main(flags) == 0


def test_errors(checkpoint, tmp_path, capfd):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    model = f"--checkpoint={checkpoint / 'model'}"
    assert main([model, f"--out={tmp_path / 'full'}"]) == 1
    assert "exists already" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main([model, "--out=x", "--platforms=cpu,npu"])
    assert "must be some of cpu,cuda,rocm,tpu, not 'npu'" in capfd.readouterr().err


def test_a_segmentation_model_is_refused():
    info = ModelInfo("upernet", 3, (32, 32), {"dim": 16, "depth": 1, "num_heads": 2, "channels": 8})
    with pytest.raises(ValueError, match="upernet is a segmentation model: only classifiers are exported"):
        inference(nnx.eval_shape(info.build), info)
