"""Folders of images with annotations, ROOT/SPLIT/images and ROOT/SPLIT/annotations, as a source."""

import dataclasses
import hashlib
import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tlvit.class_names import read_class_names
from tlvit.data.sources.folders import (
    ORDER_SEED,
    RECORD_BYTES,
    bound,
    cut,
    file_numbers,
    parse_split,
)
from tlvit.data.sources.image_files import CLASSES_FILE, file_kind, find_split, natural_key, walk_files
from tlvit.data.sources.source import Source
from tlvit.images import SUFFIXES, printable

ANNOTATION_SUFFIX = ".png"
MISSING_SHOWN = 5  # images without an annotation that an error message lists


@dataclasses.dataclass(frozen=True)
class AnnotatedFiles:
    """The files of a split.

    Attributes:
      images, annotations: the two folders.
      paths: of the images, relative to their folder, with "/", in natural order.
    """

    images: str
    annotations: str
    paths: tuple[str, ...]


def open_annotated_folder(root: str, split: str, *, num_classes: int = 0, exif: bool = False) -> Source:
    """Opens ROOT/SPLIT/images with ROOT/SPLIT/annotations, or ROOT/images/SPLIT with ROOT/annotations/SPLIT.

    The annotation of images/NAME.jpg is annotations/NAME.png, of the same size. Its pixels are class indices.
    Order, shards, keys and parts of splits are those of class folders (`open_folder`).

    Args:
      root: a local folder. Names of the classes may be in ROOT/classes.txt, one a line.
      split: a split, or a part of it: "training", "val", "train[:90%]".
      num_classes: number of classes. 0: those of classes.txt.
      exif: whether images are turned as their EXIF orientation says. Annotations are not turned.

    Raises:
      ValueError: a folder is missing, images have no annotation, or the number of classes is unknown.
    """
    root = os.path.expanduser(root)
    asked, start, stop = parse_split(split)
    folder_name, files = list_annotated(root, asked)
    split = folder_name + split[len(asked) :]
    count = len(files.paths)
    first, last = bound(start, count, default=0), bound(stop, count, default=count)
    if first >= last:
        raise ValueError(f"Split {split!r} of {printable(root)} is empty: {folder_name} has {count} images.")
    num_classes, names = _classes(root, num_classes)
    digest = hashlib.sha256("\n".join(files.paths).encode("utf-8", "surrogateescape")).hexdigest()
    identity = f"annotated_folders/{count}-images-{digest[:12]}:{folder_name}"
    origin, lengths = cut(identity, count, first, last)
    picks = np.random.RandomState(ORDER_SEED).permutation(count)[first:last]
    return Source(
        name=root,
        split=split,
        identity=f"{identity}{split[len(folder_name) :]}",
        num_examples=last - first,
        num_classes=num_classes,
        class_names=names,
        shard_lengths=lengths,
        record_bytes=RECORD_BYTES,
        key_kind="path",
        files=(files.images,) * len(lengths),
        origin=origin,
        records=file_numbers(lengths),
        parse=_file_reader(files, picks),
        exif=exif,
        has_annotations=True,
        annotation_folder=files.annotations,
    )


def list_annotated(root: str, split: str) -> tuple[str, AnnotatedFiles]:
    """The name of a split's folder ("val" and "validation" are the same) and its files.

    Raises:
      ValueError: a folder is missing, there are no images, or images have no annotation.
    """
    by_kind = all(os.path.isdir(os.path.join(root, kind)) for kind in ("images", "annotations"))
    name = find_split(os.path.join(root, "images") if by_kind else root, split)
    parts = ("images", name) if by_kind else (name, "images")
    images = os.path.join(root, *parts)
    annotations = os.path.join(root, *("annotations" if part == "images" else part for part in parts))
    for folder in (images, annotations):
        if not os.path.isdir(folder):
            raise ValueError(
                f"There is no folder {printable(folder)}: segmentation reads ROOT/SPLIT/images and "
                "ROOT/SPLIT/annotations, or ROOT/images/SPLIT and ROOT/annotations/SPLIT."
            )
    relative = lambda folder: ((path.removeprefix("/"), file) for path, file in walk_files(folder, ""))
    paths = sorted((p for p, file in relative(images) if file_kind(file) in SUFFIXES), key=natural_key)
    if not paths:
        raise ValueError(f"{printable(images)} has no images with a suffix of {', '.join(SUFFIXES)}.")
    known = {path for path, _ in relative(annotations)}
    missing = [path for path in paths if annotation_path(path) not in known]
    if missing:
        more = f" and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
        raise ValueError(
            f"{len(missing)} of {len(paths)} images in {printable(images)} have no annotation in "
            f"{printable(annotations)}: {', '.join(map(printable, missing[:MISSING_SHOWN]))}{more}. The "
            f"annotation of NAME.jpg is NAME{ANNOTATION_SUFFIX}."
        )
    return name, AnnotatedFiles(images, annotations, tuple(paths))


def annotation_path(path: str) -> str:
    """The path of an image's annotation, both relative to their folders."""
    return os.path.splitext(path)[0] + ANNOTATION_SUFFIX


def _classes(root: str, num_classes: int) -> tuple[int, tuple[str, ...] | None]:
    """The number of classes, and their names if there is a classes.txt."""
    path = os.path.join(root, CLASSES_FILE)
    if not os.path.isfile(path):
        if not num_classes:
            raise ValueError(
                f"The number of classes in {printable(root)} is unknown: write their names into "
                f"{printable(path)}, one a line, or set config.segmentation.num_classes."
            )
        return num_classes, None
    names = read_class_names(path)
    if num_classes not in (0, len(names)):
        raise ValueError(
            f"config.segmentation.num_classes is {num_classes}, but {printable(path)} has {len(names)} names."
        )
    return len(names), tuple(names)


def _file_reader(
    files: AnnotatedFiles, picks: np.ndarray
) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """{"file"} -> {"image", "annotation", "label", "key"}. The returned function reads the two files."""
    with tf.device("CPU"):
        # Created outside of a graph, so that data sets refer to these tensors instead of copying them.
        images = tf.constant([os.fsencode(files.paths[i]) for i in picks])
        annotations = tf.constant([os.fsencode(annotation_path(files.paths[i])) for i in picks])

    def parse(raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        key = tf.gather(images, raw["file"])
        image = tf.io.read_file(tf.strings.join([files.images + os.sep, key]))
        name = tf.gather(annotations, raw["file"])
        annotation = tf.io.read_file(tf.strings.join([files.annotations + os.sep, name]))
        return {"image": image, "annotation": annotation, "label": tf.constant(0, tf.int64), "key": key}

    return parse
