"""Opens, reads and verifies folders of score maps (see `tlvit.data.score_maps.format`)."""

import dataclasses
import os

import numpy as np
import tensorflow as tf

from tlvit.data.score_maps.format import INFO_FILE, STARTED_FILE, ScoreMapInfo, describe_shard
from tlvit.data.sources.source import Records, Source


def open_score_maps(path: str | os.PathLike) -> "ScoreMapReader":
    """Opens a finished folder of score maps.

    Example:
      >>> maps = tlvit.open_score_maps("/data/score_maps")
      >>> maps.info.top_k, maps.info.grid
      (5, (18, 18))

    Args:
      path: the folder.

    Raises:
      ValueError: the folder is not finished or has another format, or a shard is missing or has another size
        than described. `verify` also reads the contents.
    """
    path = os.path.expanduser(os.fspath(path))
    info_path = os.path.join(path, INFO_FILE)
    if not tf.io.gfile.exists(info_path):
        started = tf.io.gfile.exists(os.path.join(path, STARTED_FILE))
        state = (
            "is not finished: run the annotation again, it continues"
            if started
            else "is not a folder of score maps"
        )
        raise ValueError(f"{path} {state} (no {INFO_FILE}).")
    reader = ScoreMapReader(path, ScoreMapInfo.read(info_path))
    for shard, file in zip(reader.info.shards, reader.files, strict=True):
        if not tf.io.gfile.exists(file):
            raise ValueError(f"score-map shard {file} is missing")
        size = tf.io.gfile.stat(file).length
        if size != shard.bytes:
            raise ValueError(
                f"score-map shard {file} is damaged: it has {size} bytes instead of {shard.bytes}"
            )
    return reader


@dataclasses.dataclass(frozen=True)
class ScoreMapReader:
    """An opened folder of score maps.

    Attributes:
      path: the folder.
      info: the contents of its score_maps.json.
    """

    path: str
    info: ScoreMapInfo

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the shards."""
        return tuple(os.path.join(self.path, shard.file) for shard in self.info.shards)

    def check_against(self, source: Source) -> None:
        """Raises ValueError unless the maps were made for this source or for its complete split."""
        info, origin = self.info, source.origin
        if info.num_classes != source.num_classes:
            raise ValueError(
                f"The score maps in {self.path} have {info.num_classes} classes, "
                f"{source.identity} has {source.num_classes}."
            )
        known = {source.identity: source.shard_lengths, origin.identity: origin.shard_lengths}
        if info.dataset not in known:
            raise ValueError(
                f"The score maps in {self.path} were made for {info.dataset}, not for {source.identity}."
            )
        lengths = known[info.dataset]
        found = tuple(shard.records for shard in info.shards)
        if found != lengths:
            differing = [i for i, (a, b) in enumerate(zip(found, lengths, strict=False)) if a != b]
            first = f"; the first shard that differs is {differing[0]}" if differing else ""
            raise ValueError(
                f"The score maps in {self.path} have {sum(found)} records in {len(found)} shards, "
                f"{info.dataset} has {sum(lengths)} in {len(lengths)}{first}."
            )

    def records_of(self, source: Source) -> Records:
        """Returns (shard, offset) of the source -> raw map records of that shard from `offset` on.

        Raises:
          ValueError: as `check_against`.
        """
        self.check_against(source)
        count = len(source.shard_lengths)
        of_complete_split = self.info.dataset != source.identity
        shards = source.origin.shards if of_complete_split else tuple(range(count))
        offsets = source.origin.offsets if of_complete_split else (0,) * count

        def records(shard: int | tf.Tensor, offset: int | tf.Tensor) -> tf.data.Dataset:
            shard = tf.cast(shard, tf.int64)
            skip = tf.gather(tf.constant(offsets, tf.int64), shard) + tf.cast(offset, tf.int64)
            file = tf.gather(tf.constant(self.files), tf.gather(tf.constant(shards, tf.int64), shard))
            return tf.data.TFRecordDataset(file, buffer_size=1 << 20).skip(skip)

        return records

    def parse(self, record: tf.Tensor) -> dict[str, tf.Tensor]:
        """Parses a raw record: key string, missing bool, value float16 [K, h, w], index [K, h, w].

        A missing map is all zeros.
        """
        fields = {name: tf.io.FixedLenFeature([], tf.string) for name in ("key", "value", "index")}
        fields = tf.io.parse_single_example(record, fields)
        shape = (self.info.top_k, *self.info.grid)
        missing = tf.equal(tf.strings.length(fields["value"]), 0)

        def array(name: str, dtype: tf.DType) -> tf.Tensor:
            full = lambda: tf.reshape(tf.io.decode_raw(fields[name], dtype), shape)
            return tf.cond(missing, lambda: tf.zeros(shape, dtype), full)

        return {
            "key": fields["key"],
            "missing": missing,
            "value": array("value", tf.float16),
            "index": array("index", tf.as_dtype(self.info.index_dtype)),
        }

    def read(self, shard: int) -> tf.data.Dataset:
        """Returns the parsed records of one of the maps' own shards in order."""
        return tf.data.TFRecordDataset(self.files[shard]).map(self.parse)


def verify(path: str | os.PathLike, source: Source | None = None) -> ScoreMapInfo:
    """Reads and checks everything in a folder of score maps.

    Args:
      path: the folder.
      source: the images that the maps were made for, or a part of them. Their keys are compared with those of
        the maps. None: the images are not read.

    Returns:
      The description of the maps.

    Raises:
      ValueError: as `open_score_maps`, or a checksum, count, key, logit or index is wrong.
    """
    reader = open_score_maps(path)
    if source is not None:
        verify_keys(reader, source)
    seen = set()
    for number, file in enumerate(reader.files):
        verify_shard(reader, number)
        for record in reader.read(number).as_numpy_iterator():
            key = record["key"].decode()
            if key in seen:
                raise ValueError(f"{file} has a second map for {key!r}")
            seen.add(key)
            if not np.isfinite(record["value"]).all():
                raise ValueError(f"the map of {key!r} in {file} has logits that are not finite")
            if record["index"].max() >= reader.info.num_classes or record["index"].min() < 0:
                raise ValueError(
                    f"the map of {key!r} in {file} has class {record['index'].max()} "
                    f"of {reader.info.num_classes}"
                )
    if len(seen) != reader.info.num_images:
        raise ValueError(f"{path} has {len(seen)} maps instead of {reader.info.num_images}")
    return reader.info


def verify_keys(reader: ScoreMapReader, source: Source) -> None:
    """Raises ValueError unless the map of every image has the image's key."""
    records = reader.records_of(source)
    for shard, length in enumerate(source.shard_lengths):
        keys = source.records(shard, 0).map(lambda raw: source.parse(raw)["key"])
        owners = records(shard, 0).take(length).map(lambda record: reader.parse(record)["key"])
        for key, owner in tf.data.Dataset.zip(keys, owners).as_numpy_iterator():
            if key != owner:
                raise ValueError(
                    f"score map of another image: the image is {key.decode()} but its map in {reader.path} "
                    f"belongs to {owner.decode()}"
                )


def verify_shard(reader: ScoreMapReader, number: int) -> None:
    """Raises ValueError unless the checksum and the number of records of a shard are as described."""
    file, expected = reader.files[number], reader.info.shards[number]
    found = describe_shard(file)
    if found.sha256 != expected.sha256:
        raise ValueError(
            f"score-map shard {file} is damaged: SHA-256 {found.sha256[:12]}… "
            f"instead of {expected.sha256[:12]}…"
        )
    if (found.records, found.missing) != (expected.records, expected.missing):
        raise ValueError(f"score-map shard {file} has {found.records} records instead of {expected.records}")


def label_maps(label: tf.Tensor, info: ScoreMapInfo) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns value and index [K, h, w] of a map whose every cell has the image's label.

    It replaces the map of an image without one. The label's logit is 20, so its probability in a softmax over
    L classes is at least 1 - L * 2e-9.

    Args:
      label: int64 scalar, the image's label.
      info: the description of the maps.
    """
    others = tf.range(info.top_k, dtype=tf.int64)
    column = tf.cast((label + others) % info.num_classes, tf.as_dtype(info.index_dtype))
    value = tf.where(others == 0, tf.constant(20.0, tf.float16), tf.constant(0.0, tf.float16))
    shape = (info.top_k, *info.grid)
    return tuple(tf.broadcast_to(x[:, None, None], shape) for x in (value, column))


def map_matrix(encoded: tf.Tensor, info: ScoreMapInfo) -> tf.Tensor:
    """Returns the matrix float32 [2, 3] that maps a point of an image to its score map.

    Points are (x, y, 1) in [0, 1] x [0, 1] of the image and of the map. For the geometry "full" this is the
    identity. For "center" the published generator resized the image by its shorter side and cropped the
    center, so a map covers a square whose side is center_fraction times the shorter side. Points outside of
    the square are mapped to points outside of [0, 1].

    Args:
      encoded: scalar string, the encoded image. Only its size is used.
      info: the description of the maps.
    """
    if info.geometry == "full":
        return tf.constant([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    decoded_size = lambda: tf.shape(tf.io.decode_image(encoded, expand_animations=False))[:2]
    size = tf.cond(tf.io.is_jpeg(encoded), lambda: tf.io.extract_jpeg_shape(encoded)[:2], decoded_size)
    zoom = tf.cast(size, tf.float32) / (info.center_fraction * tf.cast(tf.reduce_min(size), tf.float32))
    shift = (1 - zoom) / 2  # the center is mapped to the center
    return tf.stack([tf.stack([zoom[1], 0.0, shift[1]]), tf.stack([0.0, zoom[0], shift[0]])])
