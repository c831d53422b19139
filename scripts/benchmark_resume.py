"""Measures how long the data pipeline takes to resume within an epoch; the last line printed is JSON.

    python -m scripts.benchmark resume --folder /data/scratch            # 600,000 records of 110 KB
    python -m scripts.benchmark resume --records 20000 --shards 64 --files 16

The records are in `--shards` TFRecord files, as in the TFDS version of ImageNet. To save disk space, only
`--files` of them differ; the others are hard links to these. Before each start the files are dropped from the
page cache, so that the disk is measured. `bytes_read` counts the bytes that this process read from the disk
until its first batch.
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

from scripts.benchmark_input import Photographs, make_jpegs
from tlvit.config import Config, Data
from tlvit.data import pipeline
from tlvit.data.sources.open import open_source
from tlvit.data.sources.source import Source

STARTS = (0.0, 0.1, 0.5, 0.9, 0.99, 1.5, 2.01)  # epochs


def main(argv: list[str]) -> int:
    """Writes the records, starts at several steps, and prints the JSON line."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_records(pathlib.Path(folder), options)
        source = open_source(Photographs.name, "train", data_dir=folder)
        steps = pipeline.steps_per_epoch(source, options.batch)
        starts = [start(source, options, int(epochs * steps)) for epochs in STARTS]
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
    parser.add_argument("--folder", help="temporary folder of the records; the system's by default")
    parser.add_argument("--records", type=int, default=600_000)
    parser.add_argument("--bytes", type=int, default=110_000, help="size of an image, bytes")
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--files", type=int, default=256, help="number of shards that differ")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--shuffle-gib", type=float, default=2.0)
    options = parser.parse_args(argv)
    if not 1 <= options.files <= options.shards <= options.records:
        parser.error("needs 1 <= files <= shards <= records")
    return options


def start(source: Source, options: argparse.Namespace, first_step: int) -> dict[str, float]:
    """Seconds and bytes read from the disk until the first batch of a run that resumes at `first_step`."""
    for file in set(source.files):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin, read = time.perf_counter(), disk_bytes()
    config = Config(batch_size=options.batch, data=Data(shuffle_gib=options.shuffle_gib))
    next(pipeline.train_batches(source, None, config, first_step=first_step))
    return {
        "step": first_step,
        "seconds": time.perf_counter() - begin,
        "bytes_read": disk_bytes() - read,
    }


def disk_bytes() -> int:
    """Bytes that this process has read from disks."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def make_records(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """Writes one shard with TFDS, then copies and links it as often as needed."""
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
    os.sync()  # only what is on the disk can be dropped from the page cache
    info = json.loads((data / "dataset_info.json").read_text())
    (split,) = info["splits"]
    split["shardLengths"] *= options.shards
    split["numBytes"] = str(int(split["numBytes"]) * options.shards)
    (data / "dataset_info.json").write_text(json.dumps(info))


def pad_jpeg(encoded: bytes, size: int) -> bytes:
    """Pads a JPEG to `size` bytes, or up to three fewer, with comments after its first marker."""
    comments = b""
    while (missing := size - len(encoded) - len(comments)) >= 4:
        length = min(missing - 2, 65_535)
        comments += b"\xff\xfe" + length.to_bytes(2, "big") + bytes(length - 2)
    return encoded[:2] + comments + encoded[2:]
