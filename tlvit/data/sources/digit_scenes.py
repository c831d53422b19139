"""Digit scenes as a TFDS data set, made without a download, for the demo and the digits recipes."""

import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import tensorflow as tf
import tensorflow_datasets as tfds

from tlvit.data.sources.digit_drawing import NUM_CLASSES, SceneOptions, make_scenes

MASK_CLASSES = ("background", *map(str, range(NUM_CLASSES)))  # of the pixels, in the order of their indices


def prepare(
    data_dir: str | os.PathLike,
    *,
    num_train: int = 2000,
    num_test: int = 1500,
    seed: int = 0,
    num_shards: int = 8,
    **scene: Any,
) -> tfds.core.DatasetBuilder:
    """Writes the data set `digit_scenes` below `data_dir`, or reuses one that has exactly these options.

    The progress bars of TFDS are turned off in this process.

    Args:
      data_dir: folder of TFDS data sets. The data go to digit_scenes/CONFIG/VERSION below it.
      num_train: scenes of the train split, at least 1.
      num_test: scenes of the test split, at least 1.
      seed: seeds the drawing of the scenes.
      num_shards: files of each split, at least 1. Score maps are written with as many files.
      **scene: fields of `SceneOptions` (size, digit_scale, …).

    Returns:
      A prepared builder: `builder.as_dataset("train")`, `builder.info.splits["train"].num_examples`.

    Raises:
      ValueError: a split or the number of shards is 0, or as `SceneOptions`; before anything is written.
    """
    if min(num_train, num_test, num_shards) < 1:
        raise ValueError(
            "The digit scenes need at least one train scene, one test scene and one shard, not "
            f"{num_train}, {num_test} and {num_shards}."
        )
    options = SceneOptions(**scene)
    make_scenes("test", 1, options, seed=seed)  # raises if the seed is bad or scikit-learn is missing
    config = DigitScenesConfig(
        name=config_name(num_train, num_test, seed, num_shards, options),
        description=f"{num_train} train and {num_test} test scenes, seed {seed}, options {scene}",
        num_train=num_train,
        num_test=num_test,
        seed=seed,
        scene=options,
    )
    builder = DigitScenes(data_dir=os.fspath(data_dir), config=config)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # nothing is downloaded, but TFDS says so
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(num_shards=num_shards, try_download_gcs=False)
        )
    return builder


def find_digit_scenes(name: str, data_dir: str | None = None) -> str:
    """Finds the folder of prepared digit scenes.

    Args:
      name: "digits" where `data_dir` has one set of scenes, otherwise "digits/CONFIG".
      data_dir: folder of TFDS data sets. None: ~/tensorflow_datasets.

    Raises:
      ValueError: there are no digit scenes, or the name does not select one of several sets.
    """
    root = os.path.join(os.path.expanduser(data_dir or "~/tensorflow_datasets"), "digit_scenes")
    found = sorted(tf.io.gfile.glob(os.path.join(root, "*", "*", "dataset_info.json")))
    newest = {path.split(os.sep)[-3]: os.path.dirname(path) for path in found}  # of the versions of a set
    config = name.partition("/")[2]
    folders = [folder for known, folder in newest.items() if config in ("", known)]
    if len(folders) == 1:
        return folders[0]
    names = list(newest)
    if not names:
        raise ValueError(
            f"There are no digit scenes in {root}. Prepare them once: "
            f"tlvit.data.sources.digit_scenes.prepare({os.path.dirname(root)!r}) "
            "with the arguments in the docstring of your recipe."
        )
    raise ValueError(
        f"{name!r} does not select one of the {len(names)} sets in {root}: write 'digits/NAME' with one of "
        f"{names}."
    )


def config_name(num_train: int, num_test: int, seed: int, num_shards: int, options: SceneOptions) -> str:
    """Returns the config's name: readable counts and a hash of every option."""
    fields = dataclasses.asdict(options)
    text = repr((seed, num_shards, sorted((k, repr(v)) for k, v in fields.items())))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"s{options.size}_train{num_train}_test{num_test}_seed{seed}_{digest}"


@dataclasses.dataclass(kw_only=True)
class DigitScenesConfig(tfds.core.BuilderConfig):
    """What the data are made of. Every field is part of the config's name (see `config_name`)."""

    name: str
    description: str | None = None
    num_train: int = 2000
    num_test: int = 1500
    seed: int = 0
    scene: SceneOptions = dataclasses.field(default_factory=SceneOptions)


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """The TFDS data set `digit_scenes`: image, label, file_name (a unique key), box of the class digit, and
    mask, the class of every pixel (see MASK_CLASSES)."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar = {"1.1.0": "The same scenes with masks."}
    BUILDER_CONFIGS: ClassVar = [DigitScenesConfig(name="default", description="2,000 and 1,500 scenes")]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.scene.size
        return tfds.core.DatasetInfo(
            builder=self,
            description="One large handwritten digit among smaller ones of other classes.",
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
                    "file_name": tfds.features.Text(),
                    "box": tfds.features.BBoxFeature(),
                    "mask": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        return {
            "train": self._generate_examples("train", config.num_train),
            "test": self._generate_examples("test", config.num_test),
        }

    def _generate_examples(
        self, split: Literal["train", "test"], count: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        scenes = make_scenes(split, count, self.builder_config.scene, seed=self.builder_config.seed)
        for i in range(count):
            name = f"{split}_{i:06d}.png"
            ymin, xmin, ymax, xmax = (float(v) for v in scenes.box[i])
            yield (
                name,
                {
                    "image": scenes.image[i],
                    "label": int(scenes.label[i]),
                    "file_name": name,
                    "box": tfds.features.BBox(ymin=ymin, xmin=xmin, ymax=ymax, xmax=xmax),
                    "mask": scenes.mask[i][:, :, None],
                },
            )
