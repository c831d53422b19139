"""Pictures of attention, relevance and token classes: what is in the panels, for which class."""

import jax
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from tlvit.checkpoints.load import Opened
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.drawing import explanation
from tlvit.drawing.explanation import Explanation, class_index, draw_explanations, explainer
from tlvit.models.relevance import relevance_map, rollout_map
from tlvit.ops.normalize import normalize

NAMES = ("cat", "dog", "7")
INFO = ModelInfo(
    "lvvit_s",
    3,
    (32, 48),
    {"dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "stem_width": None},
    class_names=NAMES,
)
CONVOLUTIONAL = {"widths": (8,), "depths": (1,), "strides": (2,), "group_width": 8}


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for i, path in enumerate(paths):
        Image.fromarray(np.random.RandomState(i).randint(0, 255, (40, 60, 3)).astype(np.uint8)).save(path)
    return paths


@pytest.fixture
def fixed(monkeypatch):
    """Explanations that do not run a model; the arguments of their `explainer`."""
    asked = []

    def known(model, info, kind, *, classes, top):
        asked.append((info.model, kind, tuple(classes), top))
        chosen = np.array(classes or [1, 0][:top])
        shape = {"relevance": (len(chosen), 4, 6), "attention": (1, 4, 6), "tokens": (1, 4, 6, 3)}[kind]
        maps = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        return lambda image: Explanation(np.array([0.2, 0.7, 0.1]), chosen, maps)

    monkeypatch.setattr(explanation, "explainer", known)
    return asked


def texts(figure):
    return [(axis.get_title(), axis.get_xlabel()) for axis in figure.axes]


@pytest.mark.slow
@pytest.mark.parametrize("kind", explanation.KINDS)
def test_an_explanation_is_that_of_the_model(kind):
    model = INFO.build(seed=3)
    image = np.random.RandomState(0).randint(0, 255, (32, 48, 3)).astype(np.uint8)
    pixels = normalize(image[None])
    output, dense = jax.jit(lambda x: (model(x), model.dense_logits(x)))(pixels)
    order = np.argsort(-np.asarray(output.logits[0]))
    found = explainer(model, INFO, kind, top=2)(image)
    np.testing.assert_allclose(found.probability, jax.nn.softmax(output.logits[0]), rtol=1e-4)
    np.testing.assert_array_equal(found.classes, order[:2])
    if kind == "tokens":
        expected = jax.nn.softmax(dense)
    elif kind == "attention":
        expected = jax.jit(lambda x: rollout_map(model, x))(pixels)
    else:
        expected = jax.jit(lambda x: relevance_map(model, x, order[None, :2]))(pixels)[0]
        other = explainer(model, INFO, kind, classes=[2], top=2)(image)
        assert other.classes.tolist() == [2]
        assert other.maps.shape == (1, 4, 6)
    np.testing.assert_allclose(found.maps, expected, rtol=1e-3, atol=1e-7)


def test_a_row_has_the_image_and_the_panels_of_the_model(photos, fixed):
    opened = Opened(None, INFO, None, "")
    figure = draw_explanations("relevance", [opened], photos)
    assert texts(figure) == [
        ("one.png", ""), ("relevance for dog", "probability 70 %"), ("relevance for cat", "probability 20 %"),
        ("two.png", ""), ("relevance for dog", "probability 70 %"), ("relevance for cat", "probability 20 %"),
    ]  # fmt: skip
    assert figure.axes[0].images[0].get_array().shape == (32, 48, 3)  # as the model sees it
    assert figure.get_suptitle() == "lvvit_s: relevance of the patches for a class"
    figure = draw_explanations("relevance", [opened], photos[:1], classes=["7", "0"])
    assert texts(figure)[1:] == [
        ("relevance for 7", "probability 10 %"),
        ("relevance for cat", "probability 20 %"),
    ]
    assert fixed == [("lvvit_s", "relevance", (), 2), ("lvvit_s", "relevance", (2, 0), 2)]


def test_two_models_side_by_side(photos, fixed):
    other = ModelInfo("deit_tiny_patch16_224", 3, (32, 32), {"dim": 32, "depth": 1, "num_heads": 2})
    models = [Opened(None, INFO, None, ""), Opened(None, other, None, "")]
    figure = draw_explanations("attention", models, photos[:1])
    assert texts(figure)[1:] == [
        ("lvvit_s\nattention", "whole image: dog (70 %)"),
        ("deit_tiny_patch16_224\nattention", "whole image: 1 (70 %)"),
    ]
    assert [axis.images[0].get_array().shape[:2] for axis in figure.axes] == [(32, 48), (32, 48), (32, 32)]


def test_token_classes_have_a_legend(photos, fixed):
    figure = draw_explanations("tokens", [Opened(None, INFO, None, "")], photos[:1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["7"]


def test_what_cannot_be_drawn(photos):
    from flax import nnx

    convolutional = ModelInfo("regnety_002", 3, (32, 32), CONVOLUTIONAL)
    abstract = nnx.eval_shape(convolutional.build)
    with pytest.raises(ValueError, match="RegNetY has no attention: attention and relevance are drawn of"):
        explainer(abstract, convolutional, "relevance")
    plain = ModelInfo("vit", 3, (32, 32), {"dim": 32, "depth": 1, "num_heads": 2})
    abstract = nnx.eval_shape(lambda: plain.build())
    with pytest.raises(ValueError, match="vit has no token head"):
        explainer(abstract, plain, "tokens")
    with pytest.raises(ValueError, match="has no class 'bird': give one of its names or an index below 3"):
        class_index("bird", INFO)
    photos[0].write_bytes(b"no image")
    opened = Opened(nnx.eval_shape(INFO.build), INFO, None, "")
    with pytest.raises(ValueError, match=r"one.png cannot be read: it is not a JPEG"):
        draw_explanations("attention", [opened], photos)
