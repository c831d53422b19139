"""Opens and reads folders of score maps (see `tlvit.data.score_maps.format`)."""

import dataclasses
import os

import tensorflow as tf

from tlvit.data.score_maps.format import INFO_FILE, STARTED_FILE, ScoreMapInfo
from tlvit.data.sources.source import Records, Source
from tlvit.error_text import tensorflow_sentence
from tlvit.files import check_url


def open_score_maps(path: str | os.PathLike) -> "ScoreMapReader":
    """Opens a finished folder of score maps.

    Example:
      >>> maps = tlvit.open_score_maps("/data/score_maps")
      >>> maps.info.top_k, maps.info.grid
      (5, (18, 18))

    Args:
      path: the folder.

    Raises:
      OSError: its score_maps.json cannot be read.
      ValueError: the folder is not finished or has another format, or a shard is missing or has another size
        than described. `verify` also reads the contents.
    """
    check_url(path)
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
    if not reader.files:
        raise ValueError(f"{info_path} describes no shards.")
    for shard, file in zip(reader.info.shards, reader.files, strict=True):
        if not tf.io.gfile.exists(file):
            raise ValueError(f"score-map shard {file} is missing")
        size = tf.io.gfile.stat(file).length
        if size != shard.bytes:
            raise ValueError(
                f"score-map shard {file} is damaged: it has {size} bytes instead of {shard.bytes}"
            )
    _check_first_map(reader)
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

    @property
    def map_bytes(self) -> tuple[int, int]:
        """Bytes of the logits and of the class indices of one map."""
        count = self.info.top_k * self.info.grid[0] * self.info.grid[1]
        return 2 * count, self.info.index_dtype.itemsize * count

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
        """Parses a raw record: strings key and problem, bool missing, float16 value and index [K, h, w].

        A missing map is all zeros. So is a map with another number of values than described; its problem
        says so. Otherwise the problem is empty.
        """
        feature = tf.io.FixedLenFeature([], tf.string, default_value="")
        fields = tf.io.parse_single_example(record, {name: feature for name in ("key", "value", "index")})
        shape = (self.info.top_k, *self.info.grid)
        sizes = tf.stack([tf.strings.length(fields[name]) for name in ("value", "index")])
        complete = tf.reduce_all(sizes == self.map_bytes)
        missing = tf.reduce_all(sizes == 0)

        def array(name: str, dtype: tf.DType) -> tf.Tensor:
            full = lambda: tf.reshape(tf.io.decode_raw(fields[name], dtype), shape)
            return tf.cond(complete, full, lambda: tf.zeros(shape, dtype))

        is_right = complete | (missing & (self.info.num_missing > 0))
        described = (
            f" of classes, but {INFO_FILE} describes maps of {self.map_bytes[0]} and {self.map_bytes[1]}"
        )

        def problem() -> tf.Tensor:
            value, index = tf.strings.as_string(sizes[0]), tf.strings.as_string(sizes[1])
            return tf.strings.join(["has ", value, " bytes of logits and ", index, described])

        return {
            "key": fields["key"],
            "missing": missing,
            "value": array("value", tf.float16),
            "index": array("index", tf.as_dtype(self.info.index_dtype)),
            "problem": tf.cond(is_right, lambda: tf.constant(""), problem),
        }

    def read(self, shard: int) -> tf.data.Dataset:
        """Returns the parsed records of one of the maps' own shards in order."""
        return tf.data.TFRecordDataset(self.files[shard]).map(self.parse)


def _check_first_map(reader: ScoreMapReader) -> None:
    """Raises ValueError if the first map has another number of values than described."""
    file = reader.files[0]
    try:
        first = next(iter(reader.read(0).take(1)))
    except tf.errors.OpError as error:
        raise ValueError(
            f"score-map shard {file} is damaged: {tensorflow_sentence(error.message)}"
        ) from error
    if problem := first["problem"].numpy().decode():
        raise ValueError(f"The first map of {file} {problem}.")


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
