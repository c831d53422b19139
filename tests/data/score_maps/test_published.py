"""Tests of the import of published .pt score maps: matching with the images, checks, and contents."""

import logging
import os

import numpy as np
import pytest
import tiny_images
from PIL import Image

from tlvit.data.score_maps import reader as score_maps
from tlvit.data.score_maps.published import import_published
from tlvit.data.score_maps.verification import verify
from tlvit.data.sources.open import open_source

torch = pytest.importorskip("torch")
COUNT = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_images.prepare(path, [tiny_images.position_image(i, 6, 8) for i in range(COUNT)])
    return open_source("tiny_images", "train", data_dir=str(path))


def tensor(number):
    rng = np.random.RandomState(number)
    values, indices = rng.standard_normal((5, 18, 18)), rng.rand(5, 18, 18).argsort(0)
    return torch.tensor(np.stack([values, indices])).half()


def save(folder, numbers=range(COUNT), change=None):
    """As published: LABEL_DIR/CLASS/NAME.pt."""
    for n in numbers:
        path = folder / f"class{n % 5}" / f"img_{n}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(change(tensor(n)) if change and n == 7 else tensor(n), path)
    return str(folder)


def test_every_image_gets_its_map(source, tmp_path):
    out = str(tmp_path / "maps")
    info = import_published(save(tmp_path / "pt"), source, out, threads=2)
    assert info == verify(out)
    assert (info.top_k, info.grid, info.num_classes, info.num_missing) == (5, (18, 18), 5, 0)
    assert (info.annotator, info.geometry, info.dataset) == ("imported", "center", source.identity)
    reader = score_maps.open_score_maps(out)
    reader.check_against(source)
    seen = 0
    for shard in range(len(reader.files)):
        for record in reader.read(shard).as_numpy_iterator():
            value, index = tensor(int(record["key"][4:-4])).numpy()
            np.testing.assert_array_equal(record["value"], value)
            np.testing.assert_array_equal(record["index"], index)
            seen += 1
    assert seen == COUNT


def test_an_interrupted_import_continues(source, tmp_path, caplog):
    out, folder = str(tmp_path / "maps"), save(tmp_path / "pt")
    third = source.shard_lengths[0] + source.shard_lengths[1]
    last = [r["key"].decode() for r in source.read(2).as_numpy_iterator()]
    assert len(last) == COUNT - third
    damaged = next(path for path in (tmp_path / "pt").rglob("*.pt") if f"{path.stem}.png" == last[0])
    content = damaged.read_bytes()
    damaged.write_bytes(content[:1000])
    with pytest.raises(ValueError, match=f"{damaged} is not a readable tensor"):
        import_published(folder, source, out, threads=2)
    first = os.stat(os.path.join(out, "maps-00000-of-00003.tfrecord")).st_mtime_ns
    damaged.write_bytes(content)
    with caplog.at_level(logging.INFO, "tlvit"):
        import_published(folder, source, out, threads=2)
    assert "2 of 3 shards are already written" in caplog.text
    assert os.stat(os.path.join(out, "maps-00000-of-00003.tfrecord")).st_mtime_ns == first
    verify(out)


def test_missing_maps_are_counted_and_allowed_up_to_a_fraction(source, tmp_path):
    folder = save(tmp_path / "pt", [n for n in range(COUNT) if n not in (3, 8)])
    with pytest.raises(
        ValueError, match=r"2 of the first \d+ images .* max_missing = 0.1 allows this for 1 of 12 images"
    ):
        import_published(folder, source, str(tmp_path / "a"), max_missing=0.1)
    info = import_published(folder, source, str(tmp_path / "b"), max_missing=0.2)
    assert info.num_missing == 2
    with pytest.raises(ValueError, match="2 of the first 12 images"):
        import_published(
            folder, source, str(tmp_path / "b"), max_missing=0.1
        )  # checked although all shards are written


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t[:, :, :9], r"img_7.pt has the shape \[2, 5, 9, 18\], not \[2, 5, 18, 18\]"),
        (lambda t: t.index_fill(0, torch.tensor([1]), 5.0), "has class indices from 5 to 5"),
        (lambda t: t + 0.5, "not integers from 0 to 4"),
        (lambda t: t * float("nan"), "not integers from 0 to 4"),
        (lambda t: torch.cat([t[:1] * float("inf"), t[1:]]), "has 1620 logits that are not finite"),
        (lambda t: [t], "img_7.pt has an object of type list, not a tensor"),
    ],
)
def test_errors_name_bad_files(source, tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        import_published(save(tmp_path / "pt", change=change), source, str(tmp_path / "maps"), threads=2)


def test_a_pipe_is_not_waited_for(source, tmp_path):
    folder = save(tmp_path / "pt")
    os.remove(tmp_path / "pt/class2/img_7.pt")
    os.mkfifo(tmp_path / "pt/class2/img_7.pt")
    with pytest.raises(ValueError, match=r"img_7.pt is not a regular file"):
        import_published(folder, source, str(tmp_path / "maps"), threads=2)


def test_half_precision_indices_of_many_classes_raise_an_error(tmp_path):
    images = [tiny_images.position_image(i, 4, 4) for i in range(4)]
    tiny_images.prepare(tmp_path, images, num_classes=3000)
    wide = open_source("tiny_images", "train", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="float16, which is exact up to 2048 only, for 3000 classes"):
        import_published(save(tmp_path / "pt", range(4)), wide, str(tmp_path / "maps"))


def test_files_of_class_folders_match_by_path(tmp_path):
    for n in range(4):
        path = (
            tmp_path / f"own/train/class.{n % 2}/img_{n // 2}.JPEG"
        )  # both classes have the same file names
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
        label = tmp_path / f"pt/train/class.{n % 2}/img_{n // 2}.pt"
        label.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([torch.full((1, 2, 2), float(n)), torch.full((1, 2, 2), float(n % 2))]), label)
    folder = open_source(str(tmp_path / "own"), "train")
    for number, label_dir in enumerate((tmp_path / "pt", tmp_path / "pt/train")):
        out = str(tmp_path / f"maps{number}")
        import_published(str(label_dir), folder, out, threads=2)
        found = {
            r["key"].decode(): r["value"] for r in score_maps.open_score_maps(out).read(0).as_numpy_iterator()
        }
        for n in range(4):
            assert (found[f"class.{n % 2}/img_{n // 2}"] == n).all()


def test_a_dot_in_the_name_of_an_image_is_no_suffix(tmp_path):
    for name, value in {"img": 1.0, "img.2": 2.0}.items():
        path = tmp_path / f"own/train/a/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
        label = tmp_path / f"pt/a/{name}.pt"
        label.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([torch.full((1, 2, 2), value), torch.zeros(1, 2, 2)]), label)
    out = str(tmp_path / "maps")
    import_published(str(tmp_path / "pt"), open_source(str(tmp_path / "own"), "train"), out, threads=2)
    found = {r["key"]: r["value"] for r in score_maps.open_score_maps(out).read(0).as_numpy_iterator()}
    assert {key: value.max() for key, value in found.items()} == {b"a/img": 1, b"a/img.2": 2}


def test_errors_name_what_does_not_match(source, tmp_path):
    with pytest.raises(ValueError, match=r"There are no \.pt files in"):
        import_published(str(tmp_path), source, str(tmp_path / "maps"))
    folder = save(tmp_path / "pt")
    torch.save(tensor(0), tmp_path / "pt/class2/img_1.pt")
    with pytest.raises(
        ValueError, match=r"Two files match the image 'img_1.png': class\d/img_1.pt and class\d/img_1.pt"
    ):
        import_published(folder, source, str(tmp_path / "maps"))
    (tmp_path / "other").mkdir()
    torch.save(tensor(0), tmp_path / "other/picture.pt")
    with pytest.raises(ValueError, match=r"keys like 'img_\d+.png', the files have names like 'picture.pt'"):
        import_published(str(tmp_path / "other"), source, str(tmp_path / "maps2"))
