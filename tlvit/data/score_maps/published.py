"""Brings published score maps, one .pt file an image, into folders of score maps."""

import collections
import concurrent.futures
import hashlib
import itertools
import logging
import os
import time
from typing import Literal

import numpy as np

from tlvit.data.score_maps.format import ScoreMapInfo
from tlvit.data.score_maps.published_files import read_tensor
from tlvit.data.score_maps.writer import ScoreMapWriter
from tlvit.data.sources.source import Source

CHUNK = 64  # files that a thread reads in a row
LARGEST_EXACT = {"float16": 2048, "float32": 1 << 24}  # from here on these types skip integers

log = logging.getLogger("tlvit")


def import_pt(
    label_dir: str,
    source: Source,
    out: str,
    *,
    geometry: Literal["full", "center"] = "full",
    center_share: float = 1.0,
    max_missing: float = 0.0,
    annotator: str = "imported",
    threads: int | None = None,
) -> ScoreMapInfo:
    """Write the score maps of a source from .pt files; a second call goes on where the first one stopped.

    A file holds one tensor [2, K, h, w]: logits and class indices. Its path is LABEL_DIR/PATH.pt for an image
    of key PATH.SUFFIX or PATH; else the one file below LABEL_DIR whose name is the key's last part, as in the
    published LABEL_DIR/CLASS/NAME.pt for TFDS's file names.

    Args:
      label_dir: folder of the files.
      source: the images, see `open_source`.
      out: folder of the maps.
      geometry: what a map covers: "full", the whole image, as the published training reads its maps;
        "center", the middle square, as the published generator makes them.
      center_share: with "center": side of that square as a share of the image's shorter side (the crop_pct of
        the annotator's preprocessing).
      max_missing: largest share of images that may lack a file; their maps are marked as missing.
      annotator: name of the model that made the maps, for the description.
      threads: that read files; None: eight, so that a slow disk has several to look for.

    Returns:
      The description of the finished folder.

    Raises:
      ValueError: there are no files, too many images have none or one of another shape, a file is damaged or
        holds logits that are not finite, indices that are no class or in a type that cannot name all classes,
        or two files fit one image.
    """
    files = _find_files(label_dir)
    top_k, grid = _first_shape(files, label_dir, source)
    names = hashlib.sha256("\n".join(sorted(files.by_path)).encode("utf-8", "surrogateescape")).hexdigest()
    writer = ScoreMapWriter(
        out,
        source=source,
        annotator=annotator,
        annotator_hash=names,
        top_k=top_k,
        grid=grid,
        num_classes=source.num_classes,
        geometry=geometry,
        center_share=center_share,
    )
    done = writer.done_shards()
    todo = [shard for shard in range(len(source.shard_lengths)) if shard not in done]
    log.info(
        "%d files in %s for %d images of %s: maps of %d x %d x %d; %d of %d shards are there already",
        len(files.by_path), label_dir, source.num_examples, source.identity, top_k, *grid, len(done),
        len(source.shard_lengths),
    )  # fmt: skip
    start, images, absent = time.perf_counter(), 0, 0
    with concurrent.futures.ThreadPoolExecutor(threads or 8) as pool:
        for shard in todo:
            missing = _import_shard(pool, files, source, writer, shard)
            images, absent = images + len(missing), absent + int(missing.sum())
            if absent > max_missing * source.num_examples:
                raise ValueError(_too_many(absent, images, label_dir, source, max_missing))
            rate = images / (time.perf_counter() - start)
            log.info("shard %d: %d images, %d without a file, %.0f images/s", shard, images, absent, rate)
    info = writer.finalize()
    if info.num_missing > max_missing * info.num_images:
        raise ValueError(_too_many(info.num_missing, info.num_images, label_dir, source, max_missing))
    log.info("%s: %d maps, %d images without one", out, info.num_images - info.num_missing, info.num_missing)
    return info


class _Files:
    """The .pt files of a folder, by relative path without suffix and by name."""

    def __init__(self, root: str, paths: list[str]):
        self.root, self.by_path = root, set(paths)
        self.by_name = collections.defaultdict(list)
        for path in paths:
            self.by_name[path.rpartition("/")[2]].append(path)

    def of(self, key: str) -> str | None:
        """The file of an image's key, or None."""
        for stem in (os.path.splitext(key)[0], key):
            if stem in self.by_path:
                return os.path.join(self.root, f"{stem}.pt")
        for stem in (os.path.splitext(key)[0], key):
            found = self.by_name.get(stem.rpartition("/")[2], ())
            if "/" in stem:  # a path below another root: all of its parts must be there
                found = [path for path in found if path.endswith(f"/{stem}")]
            if len(found) > 1:
                raise ValueError(f"two files fit the image {key!r}: {found[0]}.pt and {found[1]}.pt")
            if found:
                return os.path.join(self.root, f"{found[0]}.pt")
        return None


def _find_files(label_dir: str) -> _Files:
    root = os.path.expanduser(label_dir)
    paths = []
    for parent, _, names in os.walk(root):
        below = os.path.relpath(parent, root).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        paths += [prefix + name[:-3] for name in names if name.endswith(".pt") and not name.startswith(".")]
    if not paths:
        raise ValueError(f"there are no .pt files in {root}")
    return _Files(root, paths)


def _first_shape(files: _Files, label_dir: str, source: Source) -> tuple[int, tuple[int, int]]:
    """K and the grid (h, w), from the first file that one of the source's images has."""
    for shard in range(len(source.shard_lengths)):
        for key in _keys(source, shard):
            if path := files.of(key):
                value, _ = _parse(*_load(path), None, source.num_classes)
                return value.shape[0], value.shape[1:]
    example = next(iter(sorted(files.by_path)))
    raise ValueError(
        f"no image of {source.identity} has a file in {label_dir}: the images have keys like "
        f"{_keys(source, 0)[0]!r}, the files names like {example!r}.pt"
    )


def _import_shard(pool, files: _Files, source: Source, writer: ScoreMapWriter, shard: int) -> np.ndarray:
    """Write one shard; bool [n], True where an image has no file."""
    keys, info = _keys(source, shard), writer.info
    shape = (info.top_k, *info.grid)
    values = np.zeros((len(keys), *shape), np.float16)
    indices = np.zeros(values.shape, info.index_dtype)
    missing = np.ones(len(keys), bool)

    # Threads wait for the disk; what Python does with the bytes would only make threads wait for each other.
    chunks = [keys[first : first + CHUNK] for first in range(0, len(keys), CHUNK)]
    contents = itertools.chain.from_iterable(
        pool.map(lambda chunk: [_load(files.of(k)) for k in chunk], chunks)
    )
    for place, found in enumerate(contents):
        if found is not None:
            values[place], indices[place] = _parse(*found, shape, info.num_classes)
            missing[place] = False
    writer.write_shard(shard, keys, values, indices, missing)
    return missing


def _keys(source: Source, shard: int) -> list[str]:
    data = source.records(shard, 0).map(lambda raw: source.parse(raw)["key"])
    return [key.decode() for key in data.as_numpy_iterator()]


def _load(path: str | None) -> tuple[str, bytes] | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return path, file.read()


def _parse(path: str, content: bytes, shape: tuple[int, ...] | None, num_classes: int):
    """Logits float16 and class indices [K, h, w] of one file, or a ValueError that names it."""
    tensor = read_tensor(content, path)
    if tensor.ndim != 4 or tensor.shape[0] != 2 or (shape is not None and tensor.shape[1:] != shape):
        wanted = "[2, K, h, w]" if shape is None else str([2, *shape])
        raise ValueError(f"{path} has the shape {list(tensor.shape)}, not {wanted}")
    exact = LARGEST_EXACT.get(tensor.dtype.name)
    if exact is not None and num_classes > exact:
        raise ValueError(
            f"{path} keeps class indices as {tensor.dtype.name}, which is exact up to {exact} only: "
            f"it cannot name {num_classes} classes"
        )
    indices = tensor[1].astype(np.float64)
    if not np.array_equal(indices, np.rint(indices)) or indices.min() < 0 or indices.max() >= num_classes:
        raise ValueError(
            f"{path} has class indices from {indices.min():g} to {indices.max():g}, "
            f"which are not all classes 0 to {num_classes - 1}"
        )
    with np.errstate(over="ignore"):
        value = tensor[0].astype(np.float16)
    if not np.isfinite(value).all():
        raise ValueError(
            f"{path} has {int((~np.isfinite(value)).sum())} logits that are not finite in float16"
        )
    return value, indices


def _too_many(absent: int, images: int, label_dir: str, source: Source, max_missing: float) -> str:
    return (
        f"{absent} of the first {images} images of {source.identity} have no .pt file in {label_dir}, more "
        f"than max_missing = {max_missing:g} of {source.num_examples} images allows"
    )
