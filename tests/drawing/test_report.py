"""report.png: positions and colors of the cells, marks of wrong predictions, and the curves."""

import json
import math

import numpy as np
import pytest
from flax import nnx

pytest.importorskip("matplotlib")

from tlvit import visualize
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.native import Checkpoints, save_model_folder
from tlvit.drawing import report as module
from tlvit.drawing.report import ClassMap, class_map, draw, report
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize
from tlvit.training.state import state_from

OPTIONS = {"patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2, "stem_width": 8}


def info_of(name="lvvit_s", size=(48, 48), **options):
    return ModelInfo(name, 10, size, {**OPTIONS, **options}, preprocessing=Preprocessing(crop_pct=1.0))


def known_map(prediction):
    """One image, 2 x 3 cells, 4 classes. Above: certain cells of class 0, 1 and 2. Below: an uncertain cell,
    a uniform cell and a certain cell of class 3."""
    probability = np.full((1, 2, 3, 4), 0.25)
    for (y, x), k in {(0, 0): 0, (0, 1): 1, (0, 2): 2, (1, 2): 3}.items():
        probability[0, y, x] = 0.01
        probability[0, y, x, k] = 0.97
    probability[0, 1, 0] = (0.4, 0.2, 0.2, 0.2)
    return ClassMap("what it sees", probability, np.array([prediction]))


def panels(figure):
    """The axes that show pictures, top row first."""
    return [axis for axis in figure.axes if axis.images]


IMAGE = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(1, 16, 24, 3)


def test_every_cell_has_the_color_of_its_class_at_its_position():
    """Reads the pixels at the centers of the cells."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(np.full((1, 16, 24, 3), 130, np.uint8), np.array([2]), [known_map(2)], {})
    canvas = FigureCanvasAgg(figure)
    axis = panels(figure)[1]
    for text in axis.texts:
        text.set_visible(False)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(float)
    gray = 255 * (130 + 60) / 380
    table = [255 * np.array(colormaps["tab10"](k)[:3]) for k in range(4)]
    strength = {(0, 0): (0, 0.96), (0, 1): (1, 0.96), (0, 2): (2, 0.96), (1, 0): (0, 0.2), (1, 2): (3, 0.96)}
    for (y, x), (k, sure) in strength.items():
        column, row = axis.transData.transform(((x + 0.5) * 8 - 0.5, (y + 0.5) * 8 - 0.5))
        alpha = 0.75 * np.sqrt(sure)
        found = pixels[len(pixels) - 1 - round(row), round(column)]
        np.testing.assert_allclose(found, alpha * table[k] + (1 - alpha) * gray, atol=4)
    column, row = axis.transData.transform((1.5 * 8 - 0.5, 1.5 * 8 - 0.5))
    np.testing.assert_allclose(pixels[len(pixels) - 1 - round(row), round(column)], gray, atol=4)


def test_only_certain_cells_are_labeled_with_their_class():
    """Where its name fits into a cell. The legend has the others."""
    names = ["zero", "one", "two", "a very long name"]
    figure = draw(IMAGE, np.array([2]), [known_map(2)], {}, class_names=names)
    axis = panels(figure)[1]
    written = {(t.get_position()): t.get_text() for t in axis.texts}
    assert written == {(3.5, 3.5): "zero", (11.5, 3.5): "one", (19.5, 3.5): "two"}


def test_the_image_is_shown_as_it_is_with_its_class():
    figure = draw(IMAGE, np.array([2]), [known_map(2)], {}, title="a run")
    picture = panels(figure)[0]
    np.testing.assert_array_equal(picture.images[0].get_array(), IMAGE[0])
    assert picture.get_title() == "class 2"
    assert figure.get_suptitle() == "a run"
    assert [a.get_ylabel() for a in panels(figure)] == ["evaluation images", "what it sees"]


@pytest.mark.parametrize(
    ("prediction", "text", "color"), [(2, "whole image: 2", "0.2"), (1, "whole image: 1 (wrong)", "tab:red")]
)
def test_wrong_predictions_are_marked(prediction, text, color):
    axis = panels(draw(IMAGE, np.array([2]), [known_map(prediction)], {}))[1]
    assert axis.get_xlabel() == text
    assert axis.xaxis.label.get_color() == color


def test_one_class_has_one_color_in_every_row():
    """A class that only one of two models sees does not shift the colors of the other's."""
    other = known_map(2)
    other.probability[..., :] = (0.01, 0.01, 0.01, 0.97)
    figure = draw(IMAGE, np.array([1]), [known_map(2), other], {})
    _, first, second = panels(figure)
    color = first.images[1].get_array()[1, 2, :3]
    np.testing.assert_array_equal(second.images[1].get_array()[0, 0, :3], color)


def test_the_legend_names_the_classes_and_their_colors():
    """The color does not depend on what else is shown. Of many classes the most frequent ones are named."""
    from matplotlib import colormaps

    def legend(figure):
        (found,) = [sub.legends[0] for sub in figure.subfigs if sub.legends]
        colors = [patch.get_facecolor()[:3] for patch in found.get_patches()]
        return dict(zip([text.get_text() for text in found.get_texts()], colors, strict=True)), found

    named, _ = legend(draw(IMAGE, np.array([2]), [known_map(2)], {}, class_names=["a", "b", "ä", "d"]))
    assert named == {name: colormaps["tab10"](k)[:3] for k, name in enumerate(("a", "b", "ä", "d"))}
    many = ClassMap("", np.eye(100)[np.arange(100).reshape(1, 10, 10)], np.array([2]))
    named, found = legend(draw(IMAGE, np.array([30]), [many, known_map(2)], {}))
    assert {"0", "1", "2", "3", "30"} <= named.keys()
    assert named["2"] == colormaps["tab10"](2)[:3]
    assert len(set(named.values())) == len(named) == 24
    assert found.get_title().get_text() == (
        "most probable class of a cell; the stronger the color, the higher its probability "
        "(76 less frequent classes are not named)"
    )


def test_curves():
    lines = [
        {"step": 2, "train/epoch": 1.0, "train/loss": 3.0},
        {"step": 4, "train/epoch": 2.0, "train/loss": 2.0},
        {"step": 4, "eval/raw_top1": 30.0, "eval/ema_top1": 40.0},
    ]
    before = [{"step": 4, "train/epoch": 2.0, "train/loss": 1.0}, {"step": 4, "eval/raw_top1": 20.0}]
    figure = draw(IMAGE, np.array([0]), [], {"this run": lines, "without": before})
    losses, accuracy = figure.axes
    assert [list(zip(*line.get_data(), strict=True)) for line in losses.lines] == [[(1.0, 3.0), (2.0, 2.0)]]
    assert {line.get_label(): tuple(np.ravel(line.get_data())) for line in accuracy.lines} == {
        "this run, weights averaged (EMA): 40.0 %": (2.0, 40.0),
        "this run, weights not averaged (raw): 30.0 %": (2.0, 30.0),
        "without, weights not averaged (raw): 20.0 %": (2.0, 20.0),
    }
    assert losses.get_xlabel() == accuracy.get_xlabel() == "epoch"


def test_curves_of_a_run_whose_length_is_given_in_steps():
    """Of the baseline, too. An evaluation may have a line of its own."""
    lines = [
        {"step": 50, "train/epoch": 0.5, "train/loss": 3.0},
        {"step": 100, "train/epoch": 1.0, "train/loss": 2.0},
        {"step": 100, "eval/raw_top1": 30.0},
        {"step": 150, "eval/raw_top1": 35.0},
    ]
    figure = draw(IMAGE, np.array([0]), [], {"this run": lines, "other": lines[1:3]}, unit="step")
    losses, accuracy = figure.axes
    np.testing.assert_array_equal(losses.lines[0].get_data(), [[50, 100], [3, 2]])
    np.testing.assert_array_equal(accuracy.lines[0].get_data(), [[100, 150], [30, 35]])
    np.testing.assert_array_equal(accuracy.lines[1].get_data(), [[100], [30]])
    assert losses.get_xlabel() == accuracy.get_xlabel() == "step"


def test_class_map_has_the_probabilities_of_the_model():
    model = info_of().build(seed=1)
    images = np.random.RandomState(0).randint(256, size=(3, 48, 48, 3)).astype(np.uint8)
    view = class_map("x", model, info_of(), images)
    run = nnx.jit(lambda model, x: (model.dense_logits(x), model(x).logits))
    dense, logits = (np.asarray(x, np.float64) for x in run(model, normalize(images)))
    expected = np.exp(dense) / np.exp(dense).sum(-1, keepdims=True)
    np.testing.assert_allclose(view.probability, expected, rtol=1e-4)
    np.testing.assert_array_equal(view.prediction, logits.argmax(-1))
    assert view.probability.shape == (3, 6, 6, 10)


# The report of a run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from tlvit.data.sources import digit_scenes as digits

    folder = tmp_path_factory.mktemp("data")
    digits.prepare(folder, num_train=2, num_test=24, num_shards=1)
    return folder


def make_run(path, data, info):
    """A workdir as a run leaves it: config, a checkpoint and metrics."""
    import optax

    _, params, stats = functionalize(info.build(seed=1))
    checkpoints = Checkpoints(path / "checkpoints")
    checkpoints.save(state_from(params, stats, optax.sgd(0.1)), score=50.0, extra=info.to_json())
    checkpoints.close()
    settings = {"name": "digits", "eval_split": "test", "dir": str(data)}
    (path / "config.json").write_text(json.dumps({"data": settings, "token_labels": True}))
    lines = [
        {"step": s, "train/epoch": s / 4, "train/loss": math.exp(-s), "eval/ema_top1": 10.0 * s}
        for s in (1, 2, 3)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def seen(monkeypatch):
    """The arguments and results of `draw` when `report` calls it."""
    figures = []
    original = module.draw

    def keep(*arguments, **options):
        figures.append((arguments, original(*arguments, **options)))
        return figures[-1][1]

    monkeypatch.setattr(module, "draw", keep)
    return figures


@pytest.mark.slow
def test_report_of_a_run(tmp_path, data, monkeypatch):
    """Test images of different classes, the annotator's and the student's row, both runs' curves."""
    run = make_run(tmp_path / "run", data, info_of())
    base = make_run(tmp_path / "base", data, info_of())
    save_model_folder(tmp_path / "annotator", info_of().build(seed=5), info_of())
    figures = seen(monkeypatch)
    path = report(run, annotator=tmp_path / "annotator", baseline=base, count=4)
    assert path == run / "report.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    ((images, labels, views, curves), figure), = figures  # fmt: skip
    assert len(set(labels.tolist())) == len(images) == 4
    assert [v.title.split("\n")[0] for v in views] == [
        "class of each cell, annotator:", "class of each cell, student:"
    ]  # fmt: skip
    assert {k: len(v) for k, v in curves.items()} == {"this run": 3, "without token labels": 3}
    np.testing.assert_allclose(
        views[0].probability, class_map("", info_of().build(seed=5), info_of(), images).probability, rtol=1e-4
    )
    assert len(panels(figure)) == 3 * 4


@pytest.mark.slow
def test_annotator_of_another_image_size(tmp_path, data):
    run = make_run(tmp_path / "run", data, info_of())
    save_model_folder(tmp_path / "annotator", info_of(size=(64, 64)).build(), info_of(size=(64, 64)))
    assert report(run, annotator=tmp_path / "annotator", count=2).exists()


def test_run_of_a_model_without_token_head(tmp_path, data):
    info = ModelInfo("vit", 10, (48, 48), {"patch_size": 8, "dim": 32, "depth": 1, "num_heads": 2})
    assert report(make_run(tmp_path / "run", data, info)).exists()


def test_the_command(tmp_path, data, caplog, monkeypatch):
    monkeypatch.setattr(visualize, "start_logging", lambda: None)
    run = make_run(tmp_path / "run", data, info_of())
    assert visualize.main([f"--checkpoint={run}", "--count=2"]) == 0
    assert (run / "report.png").exists()
    assert visualize.main([f"--checkpoint={tmp_path / 'nothing'}"]) == 1
    assert "nothing is not the workdir of a run" in caplog.records[-1].getMessage()
    (tmp_path / "weights.pth").touch()
    assert visualize.main([f"--checkpoint={tmp_path / 'weights.pth'}"]) == 1
    assert "weights.pth is not the workdir of a run" in caplog.records[-1].getMessage()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((run / "config.json").read_text())
    assert visualize.main([f"--checkpoint={tmp_path / 'empty'}"]) == 1
    assert "empty" in caplog.records[-1].getMessage()
