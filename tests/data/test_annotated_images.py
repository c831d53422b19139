"""Batches of segmentation: restarts and processes change nothing, and an evaluation has every image once."""

import itertools

import numpy as np
import pytest
from PIL import Image

from tlvit.config import resolve
from tlvit.data import pipeline
from tlvit.data.annotated_images import annotated_eval_batches
from tlvit.data.sources.open import open_annotated_source
from tlvit.types import Batch

SIZES = [(20, 30), (20, 30), (25, 20), (20, 30), (30, 30), (20, 30), (25, 20)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Seven images of three sizes. The blue channel of image i is 10 i, its class i in the left half."""
    folder = tmp_path_factory.mktemp("scenes")
    for number, size in enumerate(SIZES):
        image, classes = np.zeros((*size, 3), np.uint8), np.full(size, 255, np.uint8)
        image[..., 2], image[..., 0] = 10 * number, np.arange(size[1])
        classes[:, : size[1] // 2] = number
        for kind, pixels in (("images", image), ("annotations", classes)):
            path = folder / "train" / kind / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


def config(root, **changes):
    settings = {
        "task": "segmentation", "token_labels": False, "batch_size": 4, "image_size": (16, 24), "seed": 5,
        "data": {"name": str(root), "threads": 2},
        "augment": {"randaugment": "", "random_erasing": 0.0},
        "segmentation": {"num_classes": 7, "scale": (60, 20), "max_class_ratio": 1.0, "photometric": False},
    }  # fmt: skip
    return resolve({**settings, **changes})


def source(root):
    return open_annotated_source(str(root), "train", num_classes=7)


def train(root, steps=3, **position):
    batches = pipeline.train_batches(source(root), None, config(root), **position)
    return list(itertools.islice(batches, steps))


def test_batches_after_a_restart_and_of_processes(root):
    batches = train(root)
    for batch in batches:
        assert isinstance(batch, Batch)
        assert (batch.image.shape, batch.segmentation.shape) == ((4, 16, 24, 3), (4, 16, 24))
        number = batch.image[..., 2].max((1, 2)) // 10
        for i in range(4):
            assert set(np.unique(batch.segmentation[i])) <= {number[i], 255}
    again = train(root, 1, first_step=2)[0]
    halves = [train(root, process_index=p, process_count=2)[2] for p in range(2)]
    for name in ("image", "segmentation", "geometry", "label"):
        expected = getattr(batches[2], name)
        np.testing.assert_array_equal(getattr(again, name), expected)
        np.testing.assert_array_equal(np.concatenate([getattr(half, name) for half in halves]), expected)


def test_an_evaluation_has_every_image_once_in_groups_of_one_size(root):
    batches = list(annotated_eval_batches(source(root), config(root), batch_size=3, threads=2))
    assert sorted(batch.image.shape[1:3] for batch in batches) == [(20, 30), (20, 30), (25, 20), (30, 30)]
    found = []
    for batch in batches:
        assert batch.image.shape[0] == batch.segmentation.shape[0] == 3
        assert batch.segmentation.shape == batch.image.shape[:3]
        assert (batch.segmentation[~batch.mask] == 255).all()
        for image, classes in zip(batch.image[batch.mask], batch.segmentation[batch.mask], strict=True):
            number = int(image[0, 0, 2]) // 10
            width = image.shape[1]
            np.testing.assert_array_equal(image[..., 0], np.tile(np.arange(width), (len(image), 1)))
            assert (classes[:, : width // 2] == number).all()
            assert (classes[:, width // 2 :] == 255).all()
            found.append(number)
    assert sorted(found) == list(range(7))


@pytest.mark.slow
def test_annotations_that_do_not_fit_are_named(root, tmp_path):
    wrong = {"size": np.zeros((9, 9), np.uint8), "class": np.full((20, 30), 7, np.uint8)}
    for kind, pixels in wrong.items():
        folder = tmp_path / kind / "train"
        for name in ("images", "annotations"):
            (folder / name).mkdir(parents=True)
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "images" / "x.png")
        Image.fromarray(pixels).save(folder / "annotations" / "x.png")
        message = (
            "image x.png has .*20 30.* its annotation .*9 9" if kind == "size" else "x.png has the index 7"
        )
        with pytest.raises(ValueError, match=message):
            list(
                annotated_eval_batches(
                    source(tmp_path / kind), config(tmp_path / kind), batch_size=1, threads=1
                )
            )


@pytest.mark.slow
def test_a_corrupt_image_is_left_out(root, tmp_path):
    for number in range(3):
        for kind in ("images", "annotations"):
            target = tmp_path / "train" / kind / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((root / "train" / kind / f"{number}.png").read_bytes())
    damaged = tmp_path / "train" / "images" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    evaluate = lambda fraction: list(
        annotated_eval_batches(
            source(tmp_path), config(tmp_path, eval={"max_corrupt": fraction}), batch_size=1, threads=1
        )
    )
    with pytest.raises(ValueError, match=r"1 of 3 images of .* cannot be read"):
        evaluate(0.0)
    assert sorted(int(batch.image[0, 0, 0, 2]) // 10 for batch in evaluate(0.5)) == [0, 2]


@pytest.fixture
def damaged(tmp_path):
    """Seven images of 8 x 8 pixels; the annotation 3.png is damaged."""
    for number in range(7):
        for kind in ("images", "annotations"):
            path = tmp_path / "train" / kind / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((8, 8, 3) if kind == "images" else (8, 8), np.uint8)).save(path)
    path = tmp_path / "train" / "annotations" / "3.png"
    path.write_bytes(path.read_bytes()[:50])
    return tmp_path


def evaluate_damaged(root, max_corrupt):
    settings = config(root, eval={"max_corrupt": max_corrupt})
    return list(annotated_eval_batches(source(root), settings, batch_size=7, threads=1))


def test_a_damaged_annotation_is_named_with_the_reason(damaged):
    with pytest.raises(ValueError, match=r"The last one is .*annotations/3\.png: .*Invalid PNG data"):
        evaluate_damaged(damaged, 0.0)
    [batch] = evaluate_damaged(damaged, 0.5)
    assert batch.mask.sum() == 6


@pytest.mark.parametrize(
    ("shape", "index", "message"),
    [((8, 8), 7, "5.png has the index 7 but"), ((9, 9), 0, r"5.png has \[8 8\] .* annotation \[9 9\]")],
)
def test_an_annotation_that_does_not_fit_is_no_corrupt_image(damaged, shape, index, message):
    """It stops evaluation and training, also where damaged files are allowed."""
    Image.fromarray(np.full(shape, index, np.uint8)).save(damaged / "train" / "annotations" / "5.png")
    with pytest.raises(ValueError, match=message):
        evaluate_damaged(damaged, 0.5)
    settings = config(damaged, data={"name": str(damaged), "threads": 1, "max_corrupt": 0.5})
    with pytest.raises(ValueError, match=message):
        list(itertools.islice(pipeline.train_batches(source(damaged), None, settings), 8))
