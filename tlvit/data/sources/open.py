"""Opens a data source by name: a TFDS data set, digit scenes or folders of images."""

import dataclasses
import os
from typing import Literal

import tensorflow as tf
import tensorflow_datasets as tfds

from tlvit.data.sources.annotated_folders import open_annotated_folder
from tlvit.data.sources.digit_scenes import MASK_CLASSES, find_digit_scenes
from tlvit.data.sources.folders import open_folder
from tlvit.data.sources.source import Source
from tlvit.data.sources.tfds import find_builder, open_annotated_builder, open_builder, open_tfds
from tlvit.files import check_url

NUM_CLASSES = {"scene_parse150": 150}  # of the annotations of TFDS data sets, which do not record it


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    exif: Literal["auto", "apply", "ignore"] = "auto",
) -> Source:
    """Opens one split of a data set.

    Example:
      >>> source = tlvit.open_source("imagenet2012", "train[:90%]", data_dir="/data/tfds")

    Args:
      name: the name of a prepared TFDS data set ("imagenet2012", "cifar10", "name/config:version", …),
        "digits" for the digit scenes, or a folder ROOT with images in ROOT/SPLIT/CLASS/.
      split: a TFDS split or a part of one ("train", "train[:90%]", "train+validation"); for class folders,
        the name of a folder in ROOT or a part of it ("val", "train[:90%]").
      data_dir: folder of the prepared TFDS data sets. None: ~/tensorflow_datasets.
      exif: whether images are turned as their EXIF orientation says: "apply", "ignore", or "auto", which
        applies it in class folders and ignores it in TFDS data sets.

    Returns:
      The source. Opening reads the data set's description or lists its files; images are read later.

    Raises:
      ValueError: the data set is unknown or not prepared, the split is unknown or empty, the data set has no
        image or no class label, its files are not TFRecords, or it is where tlvit does not read (s3://).
    """
    if "://" in name:
        raise ValueError(f"{name} cannot be opened: class folders are read from disks. Copy or mount it.")
    check_url(data_dir or "")
    if _is_class_folder(name):
        return open_folder(name, split, exif=exif != "ignore")
    if _is_digits(name):
        builder = tfds.builder_from_directory(find_digit_scenes(name, data_dir))
        source = open_builder(builder, split, name=name)
    else:
        source = open_tfds(name, split, data_dir=data_dir)
    return dataclasses.replace(source, exif=exif == "apply")


def open_annotated_source(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    num_classes: int = 0,
    exif: Literal["auto", "apply", "ignore"] = "auto",
) -> Source:
    """Opens one split of a data set whose images have the class of every pixel, for segmentation.

    Args:
      name: the name of a prepared TFDS data set ("scene_parse150", …), "digits" for the digit scenes, or a
        folder ROOT with ROOT/SPLIT/images and ROOT/SPLIT/annotations.
      split: a TFDS split or a part of one; for folders, the name of a split or a part of it.
      data_dir: folder of the prepared TFDS data sets. None: ~/tensorflow_datasets.
      num_classes: number of classes. 0: those of ROOT/classes.txt, or of a TFDS data set in NUM_CLASSES.
      exif: "apply" turns images as their EXIF orientation says. Annotations are never turned.

    Raises:
      ValueError: the data set is unknown or not prepared, the split is unknown or empty, annotations are
        missing, or the number of classes is unknown.
    """
    if "://" in name:
        raise ValueError(f"{name} cannot be opened: folders of images are read from disks. Copy or mount it.")
    check_url(data_dir or "")
    if _is_class_folder(name):
        return open_annotated_folder(name, split, num_classes=num_classes, exif=exif == "apply")
    names = None
    if _is_digits(name):
        builder = tfds.builder_from_directory(find_digit_scenes(name, data_dir))
        names, known = MASK_CLASSES, len(MASK_CLASSES)
    else:
        builder, known = find_builder(name, data_dir), NUM_CLASSES.get(name.split("/")[0].split(":")[0], 0)
    if not (num_classes or known):
        raise ValueError(
            f"The number of classes in the annotations of {name} is unknown: set "
            "config.segmentation.num_classes."
        )
    if names and num_classes not in (0, known):
        raise ValueError(f"config.segmentation.num_classes is {num_classes}, but {name} has {known} classes.")
    count = num_classes or known
    source = open_annotated_builder(builder, split, name=name, num_classes=count, class_names=names)
    return dataclasses.replace(source, exif=exif == "apply")


def _is_digits(name: str) -> bool:
    return name.split("/")[0] == "digits"


def _is_class_folder(name: str) -> bool:
    """Whether a name is written as a path, or is a folder that TFDS has not prepared."""
    if os.path.isabs(name) or name.startswith((".", "~")):
        return True
    prepared = [os.path.join(name, *["*"] * depth, "dataset_info.json") for depth in (0, 1, 2)]
    return os.path.isdir(name) and not _is_digits(name) and not any(tf.io.gfile.glob(p) for p in prepared)
