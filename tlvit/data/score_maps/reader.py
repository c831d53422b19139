"""Score maps on disk: TFRecord shards beside the shards of an image set, and a JSON file that describes them.

Record i of map shard s belongs to record i of image shard s and holds its key; `score_maps.json` is written
last, so a folder that has it is complete. Values are raw logits in float16, indices uint16 (int32 above
65,535 classes).
"""

import dataclasses
import json
import os

import numpy as np
import tensorflow as tf

from tlvit.data.score_maps.format import (
    FORMAT,
    INFO_FILE,
    STARTED_FILE,
    MapShard,
    ScoreMapInfo,
    describe_shard,
)
from tlvit.data.score_maps.writer import ScoreMapWriter as ScoreMapWriter
from tlvit.data.sources.source import Records, Source


@dataclasses.dataclass(frozen=True)
class ScoreMapReader:
    """An opened folder of score maps: `info` (see ScoreMapInfo) and its records."""

    path: str
    info: ScoreMapInfo

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(os.path.join(self.path, shard.file) for shard in self.info.shards)

    def check_against(self, source: Source) -> None:
        """Raise a ValueError that names both sides unless these are the source's or its whole split's."""
        info, origin = self.info, source.origin
        if info.num_classes != source.num_classes:
            raise ValueError(
                f"score maps in {self.path} have {info.num_classes} classes, "
                f"{source.identity} has {source.num_classes}"
            )
        known = {source.identity: source.shard_lengths, origin.identity: origin.shard_lengths}
        if info.dataset not in known:
            raise ValueError(
                f"score maps in {self.path} were made for {info.dataset}, not for {source.identity}"
            )
        lengths = known[info.dataset]
        found = tuple(shard.records for shard in info.shards)
        if found != lengths:
            differing = [i for i, (a, b) in enumerate(zip(found, lengths, strict=False)) if a != b]
            where = f"; the first shard that differs is {differing[0]}" if differing else ""
            raise ValueError(
                f"score maps in {self.path} have {sum(found)} records in {len(found)} shards, "
                f"{info.dataset} has {sum(lengths)} in {len(lengths)}{where}"
            )

    def records_of(self, source: Source) -> Records:
        """(shard, offset) of the source -> raw map records from there on, after `check_against`."""
        self.check_against(source)
        count = len(source.shard_lengths)
        whole = self.info.dataset != source.identity
        shards = source.origin.shards if whole else tuple(range(count))
        offsets = source.origin.offsets if whole else (0,) * count

        def records(shard, offset):
            shard = tf.cast(shard, tf.int64)
            skip = tf.gather(tf.constant(offsets, tf.int64), shard) + tf.cast(offset, tf.int64)
            file = tf.gather(tf.constant(self.files), tf.gather(tf.constant(shards, tf.int64), shard))
            return tf.data.TFRecordDataset(file, buffer_size=1 << 20).skip(skip)

        return records

    def parse(self, record: tf.Tensor) -> dict[str, tf.Tensor]:
        """A raw record -> key string, missing bool, value float16 [K, h, w], index uint16 or int32 [K, h, w].

        A missing map is all zeros.
        """
        fields = {name: tf.io.FixedLenFeature([], tf.string) for name in ("key", "value", "index")}
        fields = tf.io.parse_single_example(record, fields)
        shape = (self.info.top_k, *self.info.grid)
        missing = tf.equal(tf.strings.length(fields["value"]), 0)

        def array(name, dtype):
            full = lambda: tf.reshape(tf.io.decode_raw(fields[name], dtype), shape)
            return tf.cond(missing, lambda: tf.zeros(shape, dtype), full)

        return {
            "key": fields["key"],
            "missing": missing,
            "value": array("value", tf.float16),
            "index": array("index", tf.as_dtype(self.info.index_dtype)),
        }

    def read(self, shard: int) -> tf.data.Dataset:
        """Parsed records of one of the maps' own shards, in order."""
        return tf.data.TFRecordDataset(self.files[shard]).map(self.parse)


def open_score_maps(path: str) -> ScoreMapReader:
    """Open a finished folder of score maps.

    Raises:
      ValueError: there is no description, it is of another format version, or a shard is missing or of
        another size than described (`verify` reads the contents too).
    """
    path = os.path.expanduser(path)
    info_path = os.path.join(path, INFO_FILE)
    if not tf.io.gfile.exists(info_path):
        started = tf.io.gfile.exists(os.path.join(path, STARTED_FILE))
        state = (
            "is not finished: run the annotation again, it continues"
            if started
            else "is no folder of score maps"
        )
        raise ValueError(f"{path} {state} (no {INFO_FILE})")
    with tf.io.gfile.GFile(info_path) as file:
        fields = json.load(file)
    if fields.pop("format", None) != FORMAT:
        raise ValueError(f"{info_path} is not of format {FORMAT}, the one this version reads")
    shards = tuple(MapShard(**shard) for shard in fields.pop("shards"))
    info = ScoreMapInfo(**fields | {"grid": tuple(fields["grid"]), "shards": shards})
    reader = ScoreMapReader(path, info)
    for shard, file in zip(info.shards, reader.files, strict=True):
        if not tf.io.gfile.exists(file):
            raise ValueError(f"score-map shard {file} is missing")
        size = tf.io.gfile.stat(file).length
        if size != shard.bytes:
            raise ValueError(
                f"score-map shard {file} is damaged: it has {size} bytes instead of {shard.bytes}"
            )
    return reader


def verify(path: str, source: Source | None = None) -> ScoreMapInfo:
    """Read everything in a folder of score maps; return its description if all of it is sound.

    Args:
      path: the folder.
      source: the images that it should be for: with them, every key is compared with the image's.

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
    """Raise a ValueError that names both unless every image's map has its key."""
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
    """Raise a ValueError unless the checksum and the record count of one shard are as described."""
    file, promised = reader.files[number], reader.info.shards[number]
    found = describe_shard(file)
    if found.sha256 != promised.sha256:
        raise ValueError(
            f"score-map shard {file} is damaged: SHA-256 {found.sha256[:12]}… "
            f"instead of {promised.sha256[:12]}…"
        )
    if (found.records, found.missing) != (promised.records, promised.missing):
        raise ValueError(f"score-map shard {file} has {found.records} records instead of {promised.records}")


def label_maps(label: tf.Tensor, info: ScoreMapInfo) -> tuple[tf.Tensor, tf.Tensor]:
    """A map that says the image's label everywhere, for an image without one: value and index [K, h, w].

    Its logit is 20, so that the softmax over all classes gives the label all but L * 2e-9 of the weight.
    """
    others = tf.range(info.top_k, dtype=tf.int64)
    column = tf.cast((label + others) % info.num_classes, tf.as_dtype(info.index_dtype))
    value = tf.where(others == 0, tf.constant(20.0, tf.float16), tf.constant(0.0, tf.float16))
    shape = (info.top_k, *info.grid)
    return tuple(tf.broadcast_to(x[:, None, None], shape) for x in (value, column))


def map_matrix(encoded: tf.Tensor, info: ScoreMapInfo) -> tf.Tensor:
    """float32 [2, 3], from a point of the image to the point of its map, both in [0, 1] x [0, 1].

    The identity for "full". For "center" the image was resized by its shorter side and the middle cut out, as
    the published generator does, so the map covers a square of center_share times the shorter side; points
    outside of it are outside of [0, 1] and have no logits.

    Args:
      encoded: scalar string, the image file, for its size.
      info: of the maps.
    """
    if info.geometry == "full":
        return tf.constant([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    whole = lambda: tf.shape(tf.io.decode_image(encoded, expand_animations=False))[:2]
    size = tf.cond(tf.io.is_jpeg(encoded), lambda: tf.io.extract_jpeg_shape(encoded)[:2], whole)
    zoom = tf.cast(size, tf.float32) / (info.center_share * tf.cast(tf.reduce_min(size), tf.float32))
    shift = (1 - zoom) / 2  # the middle stays the middle
    return tf.stack([tf.stack([zoom[1], 0.0, shift[1]]), tf.stack([0.0, zoom[0], shift[0]])])
