"""Evaluation counts every image of a split once, whatever the batches and devices."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tensorflow as tf
import tiny_imagenet

from tlvit import main as command
from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.native import save_model_folder
from tlvit.checkpoints.torch_files import export
from tlvit.config import resolve
from tlvit.data.transforms import crop as transforms
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize
from tlvit.training.evaluation import evaluate, evaluate_checkpoint
from tlvit.training.mesh import make_mesh, replicated
from tlvit.training.prefetch import Prefetch
from tlvit.training.segmentation import SEGMENTATION
from tlvit.training.step import make_eval_step
from tlvit.types import Batch

SIZE, CLASSES, COUNT = (48, 48), 10, 37
OPTIONS = {"patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2, "stem_width": 8}
INFO = ModelInfo("lvvit_s", CLASSES, SIZE, OPTIONS, preprocessing=Preprocessing(crop_pct=1.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder, images, labels) of 37 test scenes."""
    from tlvit.data.sources import digit_scenes as digits

    folder = tmp_path_factory.mktemp("data")
    builder = digits.prepare(folder, num_train=2, num_test=COUNT, num_shards=2)
    scenes = list(builder.as_dataset("test").as_numpy_iterator())
    return folder, np.stack([s["image"] for s in scenes]), np.array([s["label"] for s in scenes])


@pytest.fixture(scope="module")
def weights():
    """Two sets of weights of one model; "b" always predicts class 3."""
    model = INFO.build(seed=1)
    net, params, stats = functionalize(model)
    bias = np.zeros(CLASSES, np.float32)
    bias[3] = 100
    other = {**params, "head": {**params["head"], "bias": bias}}
    return net, {"a": {"params": params, "stats": stats}, "b": {"params": other, "stats": stats}}


def expected(net, weights, images, labels, *mean_and_std):
    """By numpy, from one pass over all images without padding."""
    logits = net.apply(weights["params"], weights["stats"], normalize(images, *mean_and_std))[0].logits
    logits = np.asarray(logits, np.float64)
    best = np.argsort(-logits, axis=1)
    shifted = logits - logits.max(1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    return {
        "top1": 100 * np.mean(best[:, 0] == labels),
        "top5": 100 * np.mean((best[:, :5] == labels[:, None]).any(1)),
        "loss": loss.mean(),
        "count": len(labels),
    }


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 16), (1, 37), (8, 16), (8, 64)])
def test_every_image_counts_once(devices, batch_size, data, weights):
    """37 images in batches of 16, 37 or 64: the padding must not count."""
    from tlvit.data import pipeline
    from tlvit.data.sources.open import open_source

    folder, images, labels = data
    net, both = weights
    mesh = make_mesh(jax.devices()[:devices])
    placed = jax.device_put(both, replicated(mesh))
    source = open_source("digits", "test", data_dir=str(folder))
    batches = pipeline.eval_batches(source, INFO, batch_size=batch_size)
    step = make_eval_step(net, mesh, INFO.preprocessing)
    found = evaluate(step, placed, Prefetch(batches, mesh))
    assert found.keys() == {"a", "b"}
    for name in found:
        assert found[name] == pytest.approx(expected(net, both[name], images, labels), rel=1e-5)
    assert isinstance(found["a"]["count"], int)
    assert found["b"]["top1"] == pytest.approx(100 * np.mean(labels == 3))


def test_no_image_is_an_error(weights):
    net, both = weights
    with pytest.raises(ValueError, match="has no images"):
        evaluate(make_eval_step(net, make_mesh(), INFO.preprocessing), both, [])


def test_sums_over_batches(weights):
    """Sums are added before they are divided: a short last batch weighs by its images."""
    net, both = weights
    mesh = make_mesh(jax.devices()[:1])
    step = make_eval_step(net, mesh, INFO.preprocessing)
    results = []

    def spying(params, stats, batch):
        results.append(step(params, stats, batch))
        return results[-1]

    def batches():
        for i in range(3):
            yield Batch(
                image=np.full((8, *SIZE, 3), 80 * i, np.uint8),
                label=np.arange(8, dtype=np.int32),
                mask=np.arange(8) < 8 - i,
                maps=None,
                geometry=np.zeros((8, 2, 3), np.float32),
            )

    found = evaluate(spying, {"a": both["a"]}, batches())
    assert [float(r["count"]) for r in results] == [8, 7, 6]
    assert found["a"]["count"] == 21
    total = {k: sum(float(r[k]) for r in results) for k in ("top1", "top5", "loss")}
    assert found["a"]["top1"] == pytest.approx(100 * total["top1"] / 21)
    assert found["a"]["top5"] == pytest.approx(100 * total["top5"] / 21)
    assert found["a"]["loss"] == pytest.approx(total["loss"] / 21, rel=1e-6)


def config_for(folder, **changes):
    from configs import digits as recipe

    config = recipe.get_config("token_labels")
    config.data.dir = str(folder)
    config.batch_size = 16
    config.update_from_flattened_dict(changes)
    return resolve(config)


def test_model_folder(tmp_path, data, weights):
    folder, images, labels = data
    model = INFO.build(seed=1)
    save_model_folder(tmp_path / "m", model, INFO)
    found = evaluate_checkpoint(tmp_path / "m", config_for(folder))
    assert found == pytest.approx(expected(weights[0], weights[1]["a"], images, labels), rel=1e-5)


def test_the_channels_mean_and_std_of_the_settings(tmp_path, data, weights):
    """They replace those of a file, which does not record them if PyTorch wrote it."""
    folder, images, labels = data
    save_model_folder(tmp_path / "m", INFO.build(seed=1), INFO)
    mean, std = (0.1, 0.5, 0.9), (0.1, 0.2, 0.4)
    wanted = expected(weights[0], weights[1]["a"], images, labels, mean, std)
    assert abs(wanted["loss"] - expected(weights[0], weights[1]["a"], images, labels)["loss"]) > 1e-4
    found = evaluate_checkpoint(tmp_path / "m", config_for(folder, **{"data.mean": mean, "data.std": std}))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_another_number_of_classes_is_refused(tmp_path, data):
    info = ModelInfo("lvvit_s", 7, SIZE, OPTIONS)
    save_model_folder(tmp_path / "m", info.build(), info)
    with pytest.raises(ValueError, match=r"m has 7 classes, but digit_scenes/.*:test has 10"):
        evaluate_checkpoint(tmp_path / "m", config_for(data[0]))


def test_a_model_of_another_task_is_refused(tmp_path, data):
    save_model_folder(tmp_path / "m", INFO.build(), INFO)
    changes = {"task": "segmentation", "token_labels": False, "augment.random_erasing": 0.0}
    with pytest.raises(
        ValueError, match=r"m is a model for classification \(lvvit_s\), but config.task is seg"
    ):
        evaluate_checkpoint(tmp_path / "m", config_for(data[0], **changes))


def test_a_batch_that_does_not_fit_the_devices_is_refused(tmp_path, data):
    save_model_folder(tmp_path / "m", INFO.build(), INFO)
    with pytest.raises(ValueError, match=r"20 images cannot be split evenly over 8 devices"):
        evaluate_checkpoint(tmp_path / "m", config_for(data[0], **{"eval.batch_size": 20}))


@pytest.fixture(scope="module")
def always_class_2(tmp_path_factory):
    """A safetensors file of a model of 1000 classes that always predicts class 2."""
    info = ModelInfo("lvvit_t", 1000, (32, 32), {"dim": 32, "depth": 1, "num_heads": 2, "stem_width": 8})
    model = info.build()
    model.head.bias[...] = model.head.bias[...].at[2].set(100.0)
    path = tmp_path_factory.mktemp("model") / "class_2.safetensors"
    export(model, path, info=info)
    return path


def main(capfd, *arguments, status=0):
    """`python -m tlvit.main --mode=eval …` in this process: (its log, the JSON in its last line)."""
    capfd.readouterr()
    returned = command.main(["--mode=eval", "--config=lvvit_t", *map(str, arguments)])
    out, err = capfd.readouterr()
    assert returned == status, out + err
    return out + err, json.loads(out.splitlines()[-1]) if not status else None


SMALL = ("--config.eval.batch_size=16", "--config.model.dtype=float32")


def test_real_labels_by_the_command_line(tmp_path, always_class_2, capfd):
    """imagenet2012_real by its own builder: an image without labels does not count for ReaL."""
    tiny_imagenet.prepare_real(tmp_path, [[65, 2], [970], [], [809, 1, 2], [516]])
    log, found = main(
        capfd, f"--checkpoint={always_class_2}", *SMALL, f"--config.data.dir={tmp_path}",
        "--config.data.name=imagenet2012_real",
    )  # fmt: skip
    assert found["weights"]["count"] == 5
    assert (found["weights"]["top1"], found["weights"]["real"]) == (0, 50)
    assert "top-1 0.00%, top-5 0.00%, ReaL 50.00% on 5 images" in log


@pytest.mark.slow
def test_imagenet_v2_by_the_command_line(tmp_path, always_class_2, capfd):
    tiny_imagenet.prepare_v2(tmp_path, [2, 5, 2, 999])
    v2 = (
        f"--config.data.dir={tmp_path}", "--config.data.name=imagenet_v2/matched-frequency",
        "--config.data.eval_split=test",
    )  # fmt: skip
    for size in ((), ("--config.eval.image_size=48",)):
        log, found = main(capfd, f"--checkpoint={always_class_2}", *SMALL, *v2, *size)
        assert (found["weights"]["count"], found["weights"]["top1"]) == (4, 50), log
        assert "real" not in found["weights"]


@pytest.mark.slow
def test_a_files_own_crop_counts_unless_a_flag_sets_another(tmp_path, data, capfd):
    """The recipe of the digits has a crop_pct of 1 for its own runs; this file was evaluated with 0.7."""
    info = dataclasses.replace(INFO, preprocessing=Preprocessing(crop_pct=0.7))
    save_model_folder(tmp_path / "m", info.build(), info)
    words = ["--mode=eval", "--config=digits", f"--checkpoint={tmp_path}/m", f"--config.data.dir={data[0]}"]
    changed = ("--config.eval.crop_pct=0.9", "--config.eval.interpolation=bilinear")
    for flags, text in (((), "crop_pct 0.7, bicubic"), (changed, "crop_pct 0.9, bilinear")):
        assert command.main([*words, "--config.eval.batch_size=16", *flags]) == 0
        assert f"model folder, {SIZE[0]}x{SIZE[1]} pixels, {text}" in "".join(capfd.readouterr())


def test_the_command_line_says_what_is_missing(capfd):
    assert "--workdir is missing, or --checkpoint" in main(capfd, status=1)[0]


@pytest.mark.slow
def test_another_image_size_than_the_checkpoints(tmp_path, data):
    folder, images, labels = data
    save_model_folder(tmp_path / "m", model := INFO.build(seed=1), INFO)
    found = evaluate_checkpoint(tmp_path / "m", config_for(folder, **{"eval.image_size": (64, 64)}))
    large, _ = load(tmp_path / "m", image_size=64)
    net, params, stats = functionalize(large)
    assert large.grid == (8, 8) != model.grid
    encoded = [tf.io.encode_png(image) for image in images]
    resized = [transforms.eval_image(e, image_size=(64, 64), crop_pct=1.0)[0] for e in encoded]
    wanted = expected(net, {"params": params, "stats": stats}, np.stack(resized), labels)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_segmentation_in_several_processes_is_refused(monkeypatch):
    """Before anything is opened. The images of a group would differ from process to process."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="runs in one process on all of its devices, not in 2 processes"):
        SEGMENTATION.open_source(resolve({}), "train")


def test_a_pytorch_file_of_the_configs_model(tmp_path, data):
    """Its tensors fit no model of the table: the settings name the model and its options."""
    folder, images, labels = data
    model = INFO.build(seed=1)
    export(model, tmp_path / "m.safetensors")
    options = {**OPTIONS, "skip_lam": 2.0, "rule": "max"}  # the recipe has other ones
    changes = {f"model.options.{k}": v for k, v in options.items()}
    found = evaluate_checkpoint(tmp_path / "m.safetensors", config_for(folder, **changes))
    net, params, stats = functionalize(model)
    wanted = expected(net, {"params": params, "stats": stats}, images, labels)
    assert found == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match=r"tensors do not fit this LVViT"):
        evaluate_checkpoint(
            tmp_path / "m.safetensors", config_for(folder, **{**changes, "model.options.dim": 64})
        )


def test_the_first_error_of_a_file_with_a_record_is_shown(tmp_path, always_class_2, data):
    """Not that the file holds another model than the recipe trains."""
    config = config_for(data[0], **{"eval.image_size": (33, 33)})
    with pytest.raises(ValueError, match="Image size 33x33 is not a multiple of the patch size 16"):
        evaluate_checkpoint(always_class_2, config)
