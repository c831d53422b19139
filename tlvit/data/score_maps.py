"""Score maps on disk: TFRecord shards beside the shards of an image set, and a JSON file that describes them.

Record i of map shard s belongs to record i of image shard s and holds its key; `score_maps.json` is written
last, so a folder that has it is complete. Values are raw logits in float16, indices uint16 (int32 above
65,535 classes).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tlvit.data.sources import Records, Source

FORMAT = 1
INFO_FILE = "score_maps.json"
STARTED_FILE = (
    "score_maps.started.json"  # what a writer that is not finished was told; its successor must agree
)


@dataclasses.dataclass(frozen=True)
class MapShard:
    """One file of score maps: its name, records, how many of these are empty (no map), bytes and SHA-256."""

    file: str
    records: int
    missing: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ScoreMapInfo:
    """What `score_maps.json` says.

    Attributes:
      annotator: name of the model that scored the images.
      annotator_hash: hash of its checkpoint.
      dataset: identity of the source it scored (see `Source.identity`).
      num_images: number of images, missing ones included.
      top_k: classes kept for each cell, K.
      grid: rows and columns of a map, (h, w).
      num_classes: number of classes L of the annotator.
      geometry: "full": a map covers the whole image.
      shards: the files.
    """

    annotator: str
    annotator_hash: str
    dataset: str
    num_images: int
    top_k: int
    grid: tuple[int, int]
    num_classes: int
    geometry: str
    shards: tuple[MapShard, ...]

    @property
    def num_missing(self) -> int:
        return sum(shard.missing for shard in self.shards)

    @property
    def index_dtype(self) -> np.dtype:
        return index_dtype(self.num_classes)


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


def verify(path: str) -> ScoreMapInfo:
    """Read everything in a folder of score maps; return its description if all of it is sound.

    Raises:
      ValueError: as `open_score_maps`, or a checksum, count, key, logit or index is wrong.
    """
    reader = open_score_maps(path)
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


def verify_shard(reader: ScoreMapReader, number: int) -> None:
    """Raise a ValueError unless the checksum and the record count of one shard are as described."""
    file, promised = reader.files[number], reader.info.shards[number]
    found = _describe_shard(file)
    if found.sha256 != promised.sha256:
        raise ValueError(
            f"score-map shard {file} is damaged: SHA-256 {found.sha256[:12]}… "
            f"instead of {promised.sha256[:12]}…"
        )
    if (found.records, found.missing) != (promised.records, promised.missing):
        raise ValueError(f"score-map shard {file} has {found.records} records instead of {promised.records}")


class ScoreMapWriter:
    """Writes score maps shard by shard; a second writer with the same arguments continues an interrupted one.

    Several processes may write different shards of one folder; one of them calls `finalise` when all are
    done.

    Args:
      path: the folder, made if needed.
      source: the images; one map shard is written for each of its shards.
      annotator, annotator_hash, top_k, grid, num_classes, geometry: see ScoreMapInfo.

    Raises:
      ValueError: K is larger than the number of classes, the class count is not the source's, or the folder
        holds maps made with other arguments.
    """

    def __init__(
        self,
        path: str,
        *,
        source: Source,
        annotator: str,
        annotator_hash: str,
        top_k: int,
        grid: tuple[int, int],
        num_classes: int,
        geometry: str = "full",
    ):
        if not 1 <= top_k <= num_classes:
            raise ValueError(f"top_k = {top_k} is not between 1 and the number of classes, {num_classes}")
        if num_classes != source.num_classes:
            raise ValueError(
                f"the annotator has {num_classes} classes, {source.identity} has {source.num_classes}"
            )
        if geometry != "full":
            raise ValueError(f"geometry {geometry!r} is unknown; a map covers the whole image: 'full'")
        self.path = os.path.expanduser(path)
        self.source = source
        self.info = ScoreMapInfo(
            annotator=annotator,
            annotator_hash=annotator_hash,
            dataset=source.identity,
            num_images=source.num_examples,
            top_k=top_k,
            grid=tuple(grid),
            num_classes=num_classes,
            geometry=geometry,
            shards=(),
        )
        tf.io.gfile.makedirs(self.path)
        self._check_folder()

    def shard_path(self, shard_index: int) -> str:
        """Final name of a shard."""
        return os.path.join(
            self.path, f"maps-{shard_index:05d}-of-{len(self.source.shard_lengths):05d}.tfrecord"
        )

    def done_shards(self) -> set[int]:
        """Indices of the shards that are written completely."""
        return {i for i in range(len(self.source.shard_lengths)) if tf.io.gfile.exists(self.shard_path(i))}

    def write_shard(
        self,
        shard_index: int,
        keys: Sequence[str],
        values: np.ndarray,
        indices: np.ndarray,
        missing: np.ndarray | None = None,
    ) -> None:
        """Write one shard under a temporary name and rename it.

        Args:
          shard_index: index in the source.
          keys: the images' keys in the source's order, n.
          values: [n, K, h, w], raw logits.
          indices: integers [n, K, h, w], class indices.
          missing: bool [n], True where there is no map for an image; None: nowhere.

        Raises:
          ValueError: a count or shape is not the promised one, a key comes twice, a logit is not finite in
            float16, or an index is no integer or no class.
        """
        missing = np.zeros(len(keys), bool) if missing is None else np.asarray(missing, bool)
        values, indices = self._checked(shard_index, keys, np.asarray(values), np.asarray(indices), missing)
        final = self.shard_path(shard_index)
        temporary = f"{final}.tmp-{os.getpid()}"
        with tf.io.TFRecordWriter(temporary) as writer:
            for i, key in enumerate(keys):
                value, index = (b"", b"") if missing[i] else (values[i].tobytes(), indices[i].tobytes())
                writer.write(_encode({"key": key.encode(), "value": value, "index": index}))
        tf.io.gfile.rename(temporary, final, overwrite=True)

    def finalise(self) -> ScoreMapInfo:
        """Describe all shards in `score_maps.json`: from here on the folder counts as complete.

        Raises:
          ValueError: shards are missing or one of them has not as many records as the source.
        """
        lengths = self.source.shard_lengths
        absent = sorted(set(range(len(lengths))) - self.done_shards())
        if absent:
            raise ValueError(
                f"{len(absent)} of {len(lengths)} score-map shards are not written yet: {absent[:10]}"
            )
        shards = tuple(_describe_shard(self.shard_path(i)) for i in range(len(lengths)))
        for shard, length in zip(shards, lengths, strict=True):
            if shard.records != length:
                raise ValueError(f"{shard.file} has {shard.records} records, its image shard has {length}")
        info = dataclasses.replace(self.info, shards=shards)
        _write_json(os.path.join(self.path, INFO_FILE), {"format": FORMAT} | dataclasses.asdict(info))
        started = os.path.join(self.path, STARTED_FILE)
        if tf.io.gfile.exists(started):
            tf.io.gfile.remove(started)
        return info

    def _check_folder(self) -> None:
        """Note what this writer was told, or refuse a folder whose maps were made with something else."""
        mine = {"format": FORMAT} | dataclasses.asdict(dataclasses.replace(self.info, shards=()))
        mine = json.loads(json.dumps(mine))
        for name in (INFO_FILE, STARTED_FILE):
            path = os.path.join(self.path, name)
            if tf.io.gfile.exists(path):
                with tf.io.gfile.GFile(path) as file:
                    theirs = json.load(file) | {"shards": []}
                differing = [k for k in mine if mine[k] != theirs.get(k)]
                if differing:
                    listing = ", ".join(f"{k} {theirs.get(k)!r} instead of {mine[k]!r}" for k in differing)
                    raise ValueError(
                        f"{self.path} already holds score maps with {listing}: use another folder"
                    )
                return
        if self.done_shards():
            raise ValueError(f"{self.path} holds score-map shards but no description: use another folder")
        _write_json(os.path.join(self.path, STARTED_FILE), mine)

    def _checked(self, shard_index, keys, values, indices, missing) -> tuple[np.ndarray, np.ndarray]:
        """values and indices in the types of the format, or a ValueError."""
        length = self.source.shard_lengths[shard_index]
        shape = (length, self.info.top_k, *self.info.grid)
        if len(keys) != length or values.shape != shape or indices.shape != shape or len(missing) != length:
            raise ValueError(
                f"shard {shard_index} needs {length} keys and arrays of shape {shape}, not {len(keys)} keys, "
                f"values {values.shape} and indices {indices.shape}"
            )
        if len(set(keys)) != length:
            raise ValueError(
                f"shard {shard_index} has {length} records but only {len(set(keys))} different keys"
            )
        if not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"class indices are {indices.dtype}, which is not exact: give integers")
        used_values, used_indices = values[~missing], indices[~missing]
        classes = self.info.num_classes
        if used_indices.size and not 0 <= used_indices.min() <= used_indices.max() < classes:
            low, high = used_indices.min(), used_indices.max()
            raise ValueError(f"class indices from {low} to {high} do not fit {classes} classes")
        with np.errstate(over="ignore"):
            halves = used_values.astype("<f2")
        if not np.isfinite(halves).all():
            bad = int((~np.isfinite(halves)).sum())
            raise ValueError(
                f"{bad} logits of shard {shard_index} are not finite in float16 (largest: 65504)"
            )
        with np.errstate(over="ignore"):
            return values.astype("<f2"), indices.astype(index_dtype(classes).newbyteorder("<"))


def label_maps(label: tf.Tensor, info: ScoreMapInfo) -> tuple[tf.Tensor, tf.Tensor]:
    """A map that says the image's label everywhere, for an image without one: value and index [K, h, w].

    Its logit is 20, so that the softmax over all classes gives the label all but L * 2e-9 of the weight.
    """
    others = tf.range(info.top_k, dtype=tf.int64)
    column = tf.cast((label + others) % info.num_classes, tf.as_dtype(info.index_dtype))
    value = tf.where(others == 0, tf.constant(20.0, tf.float16), tf.constant(0.0, tf.float16))
    shape = (info.top_k, *info.grid)
    return tuple(tf.broadcast_to(x[:, None, None], shape) for x in (value, column))


def index_dtype(num_classes: int) -> np.dtype:
    """Type of the class indices: uint16, or int32 above 65,535 classes."""
    return np.dtype(np.uint16 if num_classes <= 65535 else np.int32)


def _encode(fields: dict[str, bytes]) -> bytes:
    feature = {k: tf.train.Feature(bytes_list=tf.train.BytesList(value=[v])) for k, v in fields.items()}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def _describe_shard(path: str) -> MapShard:
    """Count and hash a shard. Raises ValueError where it cannot be read."""
    digest = hashlib.sha256()
    size = 0
    with tf.io.gfile.GFile(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    fields = {"value": tf.io.FixedLenFeature([], tf.string)}
    empty = lambda record: tf.strings.length(tf.io.parse_single_example(record, fields)["value"]) == 0
    try:
        missing = list(tf.data.TFRecordDataset(path).map(empty).as_numpy_iterator())
    except tf.errors.DataLossError as error:
        raise ValueError(f"score-map shard {path} is damaged: {error.message.splitlines()[0]}") from error
    return MapShard(os.path.basename(path), len(missing), int(np.sum(missing)), size, digest.hexdigest())


def _write_json(path: str, content: dict) -> None:
    temporary = f"{path}.tmp-{os.getpid()}"
    with tf.io.gfile.GFile(temporary, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
    tf.io.gfile.rename(temporary, path, overwrite=True)
