"""Measures how fast images and score maps become batches; the last line printed is JSON.

    python -m scripts.benchmark input                                    # the full recipe on all cores
    python -m scripts.benchmark input --threads 1 --pillow --stages      # where the time of one core goes
    python -m scripts.benchmark input --config configs/lvvit_s.py        # with that recipe's augmentation

The images are 500-pixel JPEGs of about 60 KB made from scikit-learn's two photographs: crops with a little
noise, so that no two are equal. Their score maps have 18x18 cells and 5 classes. --config changes the
augmentation and the image size, not the images. On a machine with other load, compare `images_per_cpu_s`,
which counts the processor time of this process, and ratios within one run.
"""

import argparse
import dataclasses
import io
import itertools
import json
import math
import os
import resource
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
import PIL.Image
import tensorflow as tf
import tensorflow_datasets as tfds

from tlvit import config as settings
from tlvit.config import Config, Data
from tlvit.data import pipeline
from tlvit.data.score_maps.format import MapDescription
from tlvit.data.score_maps.reader import ScoreMapReader, open_score_maps
from tlvit.data.score_maps.writer import ScoreMapWriter
from tlvit.data.shuffle import ordered_records
from tlvit.data.sources.open import open_source
from tlvit.data.sources.source import Source
from tlvit.data.transforms.crop import train_image
from tlvit.ops.randaugment_policy import parse_policy

ROUNDS = 5  # the pipeline and the Pillow loop run in turn; the best round of each is reported
WARM = 6  # calls before each measurement, for the start-up and for batches that were prepared before it
BATCH = 64
SIZE = (375, 500)  # (height, width) of the JPEGs, pixels


def main(argv: list[str]) -> int:
    """Runs the measurement that the command line asks for and prints its JSON line."""
    options = parse(argv)
    config = read_config(options.config, options.threads)
    threads = pipeline.thread_count(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        source, maps = make_data(folder, options.images, options.corrupt)
        batches = pipeline.train_batches(source, maps, config)
        loops = {"input": lambda: count_images(batches)}
        if options.pillow:
            encoded = [example["image"] for example in source.read(0).take(BATCH).as_numpy_iterator()]
            loops["pillow"] = lambda: pillow_loop(encoded, config.image_size)
        rates = {name: {"wall": 0.0, "cpu": 0.0} for name in loops}
        for _, (name, loop) in itertools.product(range(ROUNDS), loops.items()):
            found = rate(loop, options.seconds / ROUNDS / len(loops))
            rates[name] = {kind: max(rates[name][kind], found[kind]) for kind in found}
        example = next(batches)
        result = {
            "images_per_s": rates["input"]["wall"],
            "images_per_s_per_core": rates["input"]["wall"] / min(threads, pipeline.thread_count(0)),
            "images_per_cpu_s": rates["input"]["cpu"],
            "threads": threads,
            "bytes_to_device_per_image": sum(x.nbytes for x in jax.tree.leaves(example)) / BATCH,
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "bytes_per_jpeg": source.record_bytes,
            "augment": dataclasses.asdict(config.augment),
        }
        if options.pillow:
            result["pillow_images_per_cpu_s"] = rates["pillow"]["cpu"]
            result["input_to_pillow"] = rates["input"]["cpu"] / rates["pillow"]["cpu"]
        if options.stages:
            result["stage_cpu_ms"] = measure_stages(source, maps, config, options.seconds)
            total = 1e3 / result["images_per_cpu_s"]
            result["stage_cpu_ms"]["batch"] = total - sum(result["stage_cpu_ms"].values())
    print(json.dumps(result))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmark input", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="", help="file of the recipe whose augmentation is used")
    parser.add_argument("--images", type=int, default=512, help="number of JPEGs")
    parser.add_argument("--corrupt", type=int, default=0, help="number of them that are truncated")
    parser.add_argument("--threads", type=int, default=0, help="threads that decode; 0: one for each core")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the measurement")
    parser.add_argument("--pillow", action="store_true", help="time a plain Pillow loop in the same run")
    parser.add_argument("--stages", action="store_true", help="measure the processor time of each stage")
    options = parser.parse_args(argv)
    if options.images < BATCH or options.threads < 0 or options.seconds <= 0:
        parser.error(f"needs at least {BATCH} images, no negative threads and a positive time")
    return options


def read_config(path: str, threads: int) -> Config:
    """The settings of `pipeline.train_batches`, with the augmentation and image size of the recipe at `path`.

    An empty path means the default settings.
    """
    recipe = settings.resolve(runpy.run_path(path)["get_config"]()) if path else Config()
    data = Data(threads=threads, max_corrupt=1.0)
    return dataclasses.replace(recipe, batch_size=BATCH, seed=0, data=data)


def make_data(folder: str, count: int, corrupt: int = 0, shards: int = 4) -> tuple[Source, ScoreMapReader]:
    """A TFDS data set of `count` JPEGs in `folder`, some of them truncated, and its score maps."""
    encoded = (e[: len(e) // 2] if i < corrupt else e for i, e in enumerate(make_jpegs(count)))
    builder = Photographs(encoded, data_dir=folder)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
    source = open_source("photographs", "train", data_dir=folder)
    path = os.path.join(folder, "maps")
    description = MapDescription(
        annotator="none", annotator_hash="0", top_k=5, grid=(18, 18), num_classes=1000
    )
    writer = ScoreMapWriter(path, source, description)
    rng = np.random.default_rng(0)
    for shard, length in enumerate(source.shard_lengths):
        keys = [example["key"].decode() for example in source.read(shard).as_numpy_iterator()]
        shape = (length, 5, 18, 18)
        best = rng.integers(0, 1000, (length, 1, 18, 18))
        values, indices = rng.normal(5, 2, shape), (best + 200 * np.arange(5)[:, None, None]) % 1000
        writer.write_shard(shard, keys, values.astype(np.float32), indices)
    writer.finalize()
    return source, open_score_maps(path)


class Photographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of encoded images, as `make_jpegs` gives them."""

    name = "photographs"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, encoded: Iterable[bytes], **kwargs):
        self.encoded = encoded
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        for i, encoded in enumerate(self.encoded):
            yield i, {"image": io.BytesIO(encoded), "label": i % 1000, "file_name": f"{i}.jpg"}


def make_jpegs(count: int) -> Iterator[bytes]:
    """JPEGs of SIZE, 55 to 65 KB: random crops of photographs with noise like that of a camera."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        height = int(rng.integers(330, 427))
        width = height * SIZE[1] // SIZE[0]
        top, left = rng.integers(0, 427 - height + 1), rng.integers(0, 640 - width + 1)
        crop = PIL.Image.fromarray(photograph[top : top + height, left : left + width])
        pixels = np.asarray(crop.resize(SIZE[::-1], PIL.Image.Resampling.BICUBIC), np.float32)
        pixels = pixels + rng.normal(0, 4, (*SIZE, 1))
        image = PIL.Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
        for quality in range(80, 97, 2):
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=quality)
            if stream.tell() > 55_000:
                break
        yield stream.getvalue()


def count_images(batches: Iterator) -> int:
    """Takes one batch and returns its number of images."""
    return len(next(batches).label)


def pillow_loop(encoded: list[bytes], image_size: tuple[int, int]) -> int:
    """Decodes, randomly crops and resizes every image (bicubic) in a plain loop, for comparison."""
    rng = np.random.default_rng(0)
    for item in encoded:
        image = PIL.Image.open(io.BytesIO(item)).convert("RGB")
        width, height = image.size
        w, h = width + 1, height + 1
        while w > width or h > height:
            area = rng.uniform(0.08, 1) * width * height
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        crop = image.crop((left, top, left + w, top + h))
        np.asarray(crop.resize(image_size[::-1], PIL.Image.Resampling.BICUBIC))
    return len(encoded)


def rate(work: Callable[[], int], seconds: float) -> dict[str, float]:
    """Images per second of wall-clock time and of this process's processor time."""
    settle()
    for _ in range(WARM):
        work()
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        count += work()
    return {"wall": count / (time.perf_counter() - wall), "cpu": count / (time.process_time() - cpu)}


def settle() -> None:
    """Waits until pipelines that were read before have filled their buffers and use no processor time."""
    used = -1.0
    while time.process_time() - used > 0.01:
        used = time.process_time()
        time.sleep(0.2)


def measure_stages(source: Source, maps: ScoreMapReader, config: Config, seconds: float) -> dict[str, float]:
    """Milliseconds of processor time per image of three stages: reading and parsing; decode, crop and resize;
    and the rest of the augmentation."""
    augment, map_records = config.augment, maps.records_of(source)
    resize_only = dataclasses.replace(augment, three_augment=False, color_jitter=0.0)
    policy = parse_policy(augment.randaugment) if augment.randaugment_on == "host" else None
    order = pipeline.train_order(source, config)

    def records(shard, offset):
        pairs = {"image": source.records(shard, offset), "map": map_records(shard, offset)}
        return tf.data.Dataset.zip(pairs)

    def augmented(image, seed, augment, policy=None):
        pixels, matrix = train_image(image, seed, config.image_size, augment, policy=policy)
        return pixels[0, 0, 0], matrix

    def stage(transform):
        def prepare(raw, counter):
            image, score_map = source.parse(raw["image"]), maps.parse(raw["map"])
            seed = tf.stack([tf.constant(0, tf.int64), counter])
            return transform(image["image"], seed), score_map["value"]

        data = ordered_records(records, order).map(prepare, num_parallel_calls=1).batch(BATCH)
        one_thread = tf.data.Options()
        one_thread.threading.private_threadpool_size = 1
        one_thread.threading.max_intra_op_parallelism = 1
        iterator = iter(data.with_options(one_thread))
        step = lambda: len(next(iterator)[1])
        step()
        return 1e3 / max(rate(step, seconds / 3 / ROUNDS)["cpu"] for _ in range(ROUNDS))

    reading = stage(lambda image, seed: tf.strings.length(image))
    resizing = stage(lambda image, seed: augmented(image, seed, resize_only))
    augmenting = stage(lambda image, seed: augmented(image, seed, augment, policy))
    return {
        "read": reading,
        "decode_crop_resize": resizing - reading,
        "augment": augmenting - resizing,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
