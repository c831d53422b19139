"""Imports published score maps, one .pt file an image, into a folder of score maps."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import logging
import os
import time
from typing import Literal

import numpy as np

from tlvit.data.score_maps.format import MapDescription, ScoreMapInfo
from tlvit.data.score_maps.published_files import read_tensor
from tlvit.data.score_maps.writer import ScoreMapWriter
from tlvit.data.sources.source import Source

CHUNK = 64  # files that a thread reads in a row
THREADS = 8  # reading waits for the disk, so the number does not depend on the cores
LARGEST_EXACT = {"float16": 2048, "float32": 1 << 24}  # above these, the types do not represent all integers

log = logging.getLogger("tlvit")


def import_published(
    label_dir: str | os.PathLike,
    source: Source,
    out: str | os.PathLike,
    *,
    geometry: Literal["full", "center"] = "center",
    center_fraction: float = 1.0,
    max_missing: float = 0.0,
    annotator: str = "imported",
    threads: int = 0,
) -> ScoreMapInfo:
    """Writes the score maps of a source from .pt files. A second call continues an interrupted one.

    A file has one tensor [2, K, h, w]: logits and class indices. The file of an image is LABEL_DIR/PATH.pt if
    the image's key is PATH or PATH.SUFFIX. If there is no such file, it is the only file below LABEL_DIR
    whose name is the last part of the key. That matches the published LABEL_DIR/CLASS/NAME.pt with the keys
    of TFDS, which are file names.

    Args:
      label_dir: folder of the .pt files.
      source: the images.
      out: folder of the score maps.
      geometry: what a map covers: "center", a square in the middle, which is how the published generator
        makes its maps, or "full", the entire image, which is how the published training reads them. That
        displaces the maps of 4:3 images by up to 12.5 % of the width.
      center_fraction: with "center", the side of the square as a fraction of the image's shorter side, in
        (0, 1]: the crop_pct of the annotator's preprocessing.
      max_missing: largest fraction of images without a file, in [0, 1]. They get no map.
      annotator: name of the model that made the maps, for the description.
      threads: threads that read files. 0: eight.

    Returns:
      The description of the finished folder.

    Raises:
      ValueError: there are no files, too many images have no file, two files match one image, or a file is
        damaged, has another shape than the first, has logits that are not finite, or has indices that are
        not classes.
    """
    files = _find_files(os.fspath(label_dir))
    top_k, grid = _first_shape(files, source)
    description = MapDescription(
        annotator=annotator,
        annotator_hash=files.hash_names(),
        top_k=top_k,
        grid=grid,
        num_classes=source.num_classes,
        geometry=geometry,
        center_fraction=center_fraction,
    )
    # The published generator ignores the EXIF orientation.
    writer = ScoreMapWriter(out, dataclasses.replace(source, exif=False), description)
    _import_shards(writer, files, max_missing=max_missing, threads=threads or THREADS)
    info = writer.finalize()
    _check_missing(info.num_missing, info.num_images, files, source, max_missing)
    return info


class _Files:
    """The .pt files of a folder, by their relative path without suffix and by their name."""

    def __init__(self, root: str, paths: list[str]):
        self.root, self.by_path = root, set(paths)
        self.by_name = collections.defaultdict(list)
        for path in paths:
            self.by_name[path.rpartition("/")[2]].append(path)

    def of(self, key: str) -> str | None:
        """The path of the file of an image's key, or None."""
        # The key itself first: that of a class folder has no suffix, but its name may have dots.
        stems = (key, os.path.splitext(key)[0])
        for stem in stems:
            if stem in self.by_path:
                return os.path.join(self.root, f"{stem}.pt")
        for stem in stems:
            found = self.by_name.get(stem.rpartition("/")[2], ())
            if "/" in stem:  # the key is a path: all of its parts must match
                found = [path for path in found if path.endswith(f"/{stem}")]
            if len(found) > 1:
                raise ValueError(f"Two files match the image {key!r}: {found[0]}.pt and {found[1]}.pt.")
            if found:
                return os.path.join(self.root, f"{found[0]}.pt")
        return None

    def hash_names(self) -> str:
        """A hash of the files' names, which tells two sets of published maps apart."""
        text = "\n".join(sorted(self.by_path))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _find_files(label_dir: str) -> _Files:
    root = os.path.expanduser(label_dir)
    paths = []
    for parent, _, names in os.walk(root):
        below = os.path.relpath(parent, root).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        paths += [prefix + name[:-3] for name in names if name.endswith(".pt") and not name.startswith(".")]
    if not paths:
        raise ValueError(f"There are no .pt files in {root}.")
    return _Files(root, paths)


def _first_shape(files: _Files, source: Source) -> tuple[int, tuple[int, int]]:
    """K and the grid (h, w) of the first file that matches an image."""
    for shard in range(len(source.shard_lengths)):
        for key in _keys(source, shard):
            found = _load(files.of(key))
            if found is not None:
                value, _ = _parse(*found, None, source.num_classes)
                return value.shape[0], value.shape[1:]
    example = next(iter(sorted(files.by_path)))
    raise ValueError(
        f"No image of {source.identity} has a file in {files.root}. The images have keys like "
        f"{_keys(source, 0)[0]!r}, the files have names like '{example}.pt'."
    )


def _import_shards(writer: ScoreMapWriter, files: _Files, *, max_missing: float, threads: int) -> None:
    """Writes all shards that are not written yet."""
    source, info = writer.source, writer.info
    done = writer.done_shards()
    todo = [shard for shard in range(len(source.shard_lengths)) if shard not in done]
    log.info(
        "%d files in %s for %d images of %s: maps of %d x %d x %d; %d of %d shards are already written",
        len(files.by_path), files.root, source.num_examples, source.identity, info.top_k, *info.grid,
        len(done), len(source.shard_lengths),
    )  # fmt: skip
    start, images, absent = time.perf_counter(), 0, 0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for shard in todo:
            missing = _import_shard(pool, files, writer, shard)
            images, absent = images + len(missing), absent + int(missing.sum())
            _check_missing(absent, images, files, source, max_missing)
            rate = images / (time.perf_counter() - start)
            log.info("shard %d: %d images, %d without a file, %.0f images/s", shard, images, absent, rate)


def _import_shard(
    pool: concurrent.futures.Executor, files: _Files, writer: ScoreMapWriter, shard: int
) -> np.ndarray:
    """Writes one shard. Returns bool [n], True for images without a file."""
    keys, info = _keys(writer.source, shard), writer.info
    shape = (info.top_k, *info.grid)
    values = np.zeros((len(keys), *shape), np.float16)
    indices = np.zeros(values.shape, info.index_dtype)
    missing = np.ones(len(keys), bool)

    # The threads only read. Parsing holds Python's lock, so it would not run in parallel.
    chunks = [keys[first : first + CHUNK] for first in range(0, len(keys), CHUNK)]
    contents = itertools.chain.from_iterable(
        pool.map(lambda chunk: [_load(files.of(k)) for k in chunk], chunks)
    )
    for i, found in enumerate(contents):
        if found is not None:
            values[i], indices[i] = _parse(*found, shape, info.num_classes)
            missing[i] = False
    writer.write_shard(shard, keys, values, indices, missing)
    return missing


def _keys(source: Source, shard: int) -> list[str]:
    """The keys of a shard's images."""
    data = source.records(shard, 0).map(lambda raw: source.parse(raw)["key"])
    return [os.fsdecode(key) for key in data.as_numpy_iterator()]


def _load(path: str | None) -> tuple[str, bytes] | None:
    """The path and content of a file, or None for an image without one."""
    if path is None:
        return None
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file.")
    with open(path, "rb") as file:
        return path, file.read()


def _parse(
    path: str, content: bytes, shape: tuple[int, ...] | None, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits float16 and class indices [K, h, w] of one file. Raises ValueError with the file's name."""
    tensor = read_tensor(content, path)
    if tensor.ndim != 4 or tensor.shape[0] != 2 or (shape is not None and tensor.shape[1:] != shape):
        wanted = "[2, K, h, w]" if shape is None else str([2, *shape])
        raise ValueError(f"{path} has the shape {list(tensor.shape)}, not {wanted}.")
    exact = LARGEST_EXACT.get(tensor.dtype.name)
    if exact is not None and num_classes > exact:
        raise ValueError(
            f"{path} has class indices of type {tensor.dtype.name}, which is exact up to {exact} only, for "
            f"{num_classes} classes."
        )
    indices = tensor[1].astype(np.float64)
    if not np.array_equal(indices, np.rint(indices)) or indices.min() < 0 or indices.max() >= num_classes:
        raise ValueError(
            f"{path} has class indices from {indices.min():g} to {indices.max():g}, "
            f"not integers from 0 to {num_classes - 1}."
        )
    with np.errstate(over="ignore"):
        value = tensor[0].astype(np.float16)
    if not np.isfinite(value).all():
        raise ValueError(
            f"{path} has {int((~np.isfinite(value)).sum())} logits that are not finite in float16."
        )
    return value, indices


def _check_missing(absent: int, images: int, files: _Files, source: Source, max_missing: float) -> None:
    """Raises ValueError if too many images have no file."""
    if absent > max_missing * source.num_examples:
        raise ValueError(
            f"{absent} of the first {images} images of {source.identity} have no .pt file in {files.root}. "
            f"max_missing = {max_missing:g} allows this for {int(max_missing * source.num_examples)} of "
            f"{source.num_examples} images."
        )
