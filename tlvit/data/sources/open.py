"""Opens a data source by name: a TFDS data set, digit scenes or class folders."""

import dataclasses
import os
from typing import Literal

import tensorflow as tf
import tensorflow_datasets as tfds

from tlvit.data.sources.digit_scenes import find_digit_scenes
from tlvit.data.sources.folders import open_folder
from tlvit.data.sources.source import Source
from tlvit.data.sources.tfds import open_builder, open_tfds
from tlvit.files import check_url


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


def _is_digits(name: str) -> bool:
    return name.split("/")[0] == "digits"


def _is_class_folder(name: str) -> bool:
    """Whether a name is written as a path, or is a folder that TFDS has not prepared."""
    if os.path.isabs(name) or name.startswith((".", "~")):
        return True
    prepared = [os.path.join(name, *["*"] * depth, "dataset_info.json") for depth in (0, 1, 2)]
    return os.path.isdir(name) and not _is_digits(name) and not any(tf.io.gfile.glob(p) for p in prepared)
