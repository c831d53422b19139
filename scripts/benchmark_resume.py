"""Measures how long the data pipeline takes to go on in the middle of an epoch; the last line is JSON.

    python -m scripts.benchmark resume --folder /data/scratch            # 600,000 records of 110 KB
    python -m scripts.benchmark resume --records 20000 --shards 64 --files 16

The records lie in `--shards` TFRecord files as TFDS lays out ImageNet. Only `--files` of them differ; the
others are hard links to these, to save disk. Before each start the files are dropped from the page cache, so
that the disk is measured. `bytes_read` is what this process asked the disk for until its first batch.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time

import tensorflow_datasets as tfds

from scripts.benchmark_input import RECIPE, Photographs, make_jpegs
from tlvit.data import pipeline
from tlvit.data.sources import tfds as sources
from tlvit.data.sources.source import Source

STARTS = (0.0, 0.1, 0.5, 0.9, 0.99, 1.5, 2.01)  # in epochs


def main(argv: list[str]) -> int:
    """Make the records, start at several places, print the JSON line."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_records(pathlib.Path(folder), options)
        source = sources.open_source(Photographs.name, "train", data_dir=folder)
        steps = pipeline.steps_per_epoch(source, options.batch)
        starts = [start(source, options, int(share * steps)) for share in STARTS]
    seconds = [s["seconds"] for s in starts]
    result = {
        "records": source.num_examples,
        "record_bytes": source.record_bytes,
        "shards": options.shards,
        "shuffle_gib": options.shuffle_gib,
        "first_batch_s": statistics.median(seconds),
        "first_batch_s_at_most": max(seconds),
        "starts": starts,
    }
    print(json.dumps(result))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmark resume", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", help="where the records are made for a while; the system's own by default"
    )
    parser.add_argument("--records", type=int, default=600_000)
    parser.add_argument("--bytes", type=int, default=110_000, help="of an image")
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--files", type=int, default=256, help="shards that differ")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--shuffle-gib", type=float, default=2.0)
    options = parser.parse_args(argv)
    if not 1 <= options.files <= options.shards <= options.records:
        parser.error("needs 1 <= files <= shards <= records")
    return options


def start(source: Source, options: argparse.Namespace, first_step: int) -> dict[str, float]:
    """The first batch of a run that goes on at `first_step`: seconds, and bytes read from the disk."""
    for file in set(source.files):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin, read = time.perf_counter(), disk_bytes()
    batches = pipeline.train_batches(
        source, batch_size=options.batch, image_size=(224, 224), seed=0, first_step=first_step, **RECIPE,
        shuffle_bytes=int(options.shuffle_gib * 2**30),
    )  # fmt: skip
    next(batches)
    return {
        "step": first_step,
        "seconds": time.perf_counter() - begin,
        "bytes_read": disk_bytes() - read,
    }


def disk_bytes() -> int:
    """Bytes that this process has read from disks so far."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def make_records(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """One shard by TFDS, copied and linked until there are as many as wanted."""
    encoded = (pad_jpeg(jpeg, options.bytes) for jpeg in make_jpegs(options.records // options.shards))
    builder = Photographs(encoded, data_dir=folder)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=1, try_download_gcs=False)
    )
    data = pathlib.Path(builder.data_dir)
    first = data / f"{Photographs.name}-train.tfrecord-00000-of-00001"
    names = [
        data / f"{Photographs.name}-train.tfrecord-{i:05d}-of-{options.shards:05d}"
        for i in range(options.shards)
    ]
    for i, name in enumerate(names):
        if i < options.files:
            shutil.copyfile(first, name)
        else:
            os.link(names[i % options.files], name)
    first.unlink()
    os.sync()  # what is not on the disk yet cannot be dropped from the cache
    info = json.loads((data / "dataset_info.json").read_text())
    (split,) = info["splits"]
    split["shardLengths"] *= options.shards
    split["numBytes"] = str(int(split["numBytes"]) * options.shards)
    (data / "dataset_info.json").write_text(json.dumps(info))


def pad_jpeg(encoded: bytes, size: int) -> bytes:
    """The same picture in a file of `size` bytes (at most three fewer): comments follow the first marker."""
    comments = b""
    while (missing := size - len(encoded) - len(comments)) >= 4:
        length = min(missing - 2, 65_535)
        comments += b"\xff\xfe" + length.to_bytes(2, "big") + bytes(length - 2)
    return encoded[:2] + comments + encoded[2:]
