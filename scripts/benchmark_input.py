"""Measures how fast images and score maps become batches; the last line printed is JSON.

    python -m scripts.benchmark input                                    # the full recipe on all cores
    python -m scripts.benchmark input --threads 1 --pillow --stages      # where the time of one core goes
    python -m scripts.benchmark input --config configs/lvvit_s.py        # with that recipe's augmentation

The images are 500-pixel JPEGs of about 60 KB made from scikit-learn's two photographs (crops with a little
noise, so that no two are equal), with score maps of 18x18 cells and 5 classes. With --config, the
augmentation is the recipe's; the images are still these. On a machine that others use too, compare
`images_per_cpu_s`, which counts the processor time of this process, and ratios within one run.
"""

import argparse
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

from tlvit.data import pipeline
from tlvit.data import shuffle as order
from tlvit.data.score_maps import reader as score_maps
from tlvit.data.score_maps.writer import ScoreMapWriter
from tlvit.data.sources import tfds as sources
from tlvit.data.sources.source import Source
from tlvit.data.transforms import crop as transforms
from tlvit.ops.randaugment_policy import parse_policy

RECIPE = {"interpolation": "random", "randaugment": "rand-m9-n2-mstd0.5-inc1"}
ROUNDS = 5  # of the pipeline and the Pillow loop in turn; the best round of each counts
WARM = 6  # calls before each measurement: the start-up, and batches that lay ready
BATCH = 64
SIZE = (375, 500)


def main(argv: list[str]) -> int:
    """Run the measurement that the command line asks for; print its JSON line."""
    options = parse(argv)
    image_size, augment = read_recipe(options.config) if options.config else ((224, 224), dict(RECIPE))
    threads = options.threads or pipeline.available_cores()
    with tempfile.TemporaryDirectory() as folder:
        source, maps = make_data(folder, options.images, options.broken)
        common = dict(batch_size=BATCH, image_size=image_size, seed=0, max_bad=1.0)
        batches = pipeline.train_batches(source, maps, **common, **augment, num_threads=threads)
        loops = {"input": lambda: count_images(batches)}
        if options.pillow:
            encoded = [example["image"] for example in source.read(0).take(BATCH).as_numpy_iterator()]
            loops["pillow"] = lambda: pillow_loop(encoded, image_size)
        rates = {name: {"wall": 0.0, "cpu": 0.0} for name in loops}
        for _, (name, loop) in itertools.product(range(ROUNDS), loops.items()):
            found = rate(loop, options.seconds / ROUNDS / len(loops))
            rates[name] = {kind: max(rates[name][kind], found[kind]) for kind in found}
        example = next(batches)
        result = {
            "images_per_s": rates["input"]["wall"],
            "images_per_s_per_core": rates["input"]["wall"] / min(threads, pipeline.available_cores()),
            "images_per_cpu_s": rates["input"]["cpu"],
            "threads": threads,
            "bytes_to_device_per_image": sum(x.nbytes for x in jax.tree.leaves(example)) / BATCH,
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "bytes_per_jpeg": source.record_bytes,
            "augment": augment,
        }
        if options.pillow:
            result["pillow_images_per_cpu_s"] = rates["pillow"]["cpu"]
            result["input_to_pillow"] = rates["input"]["cpu"] / rates["pillow"]["cpu"]
        if options.stages:
            result["stage_cpu_ms"] = measure_stages(source, maps, image_size, augment, options.seconds)
            whole = 1e3 / result["images_per_cpu_s"]
            result["stage_cpu_ms"]["batch"] = whole - sum(result["stage_cpu_ms"].values())
    print(json.dumps(result))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmark input", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="", help="a recipe whose augmentation is used")
    parser.add_argument("--images", type=int, default=512, help="how many JPEGs to make")
    parser.add_argument("--broken", type=int, default=0, help="how many of them end in the middle")
    parser.add_argument("--threads", type=int, default=0, help="that decode; 0: one for each core")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure")
    parser.add_argument("--pillow", action="store_true", help="time a plain Pillow loop in the same run")
    parser.add_argument("--stages", action="store_true", help="processor time of each stage")
    options = parser.parse_args(argv)
    if options.images < BATCH or options.threads < 0 or options.seconds <= 0:
        parser.error(f"needs at least {BATCH} images, no negative threads and a positive time")
    return options


def read_recipe(path: str) -> tuple[tuple[int, int], dict]:
    """Image size and the options of `pipeline.train_batches` that a recipe's `augment` sets."""
    config = runpy.run_path(path)["get_config"]()
    augment = config.augment
    names = ("hflip", "randaugment", "three_augment", "color_jitter", "exact_resize", "interpolation")
    options = {name: augment[name] for name in names if name in augment}
    options |= {"scale": tuple(augment.crop_scale), "ratio": tuple(augment.crop_ratio), "hflip": augment.flip}
    if augment.get("on", "host") == "device":
        options["randaugment"] = ""
    size = config.image_size
    return (tuple(size) if not isinstance(size, int) else (size, size)), options


def make_data(folder: str, count: int, broken: int = 0) -> tuple[Source, score_maps.ScoreMapReader]:
    """A TFDS set of `count` JPEGs in `folder`, some of them `broken`, and score maps for it."""
    encoded = (e[: len(e) // 2] if i < broken else e for i, e in enumerate(make_jpegs(count)))
    builder = Photographs(encoded, data_dir=folder)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    source = sources.open_source("photographs", "train", data_dir=folder)
    path = os.path.join(folder, "maps")
    kinds = dict(top_k=5, grid=(18, 18), num_classes=1000)
    writer = ScoreMapWriter(path, source=source, annotator="none", annotator_hash="0", **kinds)
    rng = np.random.default_rng(0)
    for shard, length in enumerate(source.shard_lengths):
        keys = [example["key"].decode() for example in source.read(shard).as_numpy_iterator()]
        shape = (length, 5, 18, 18)
        values, indices = rng.normal(5, 2, shape), rng.integers(0, 1000, shape)
        writer.write_shard(shard, keys, values.astype(np.float32), indices)
    writer.finalize()
    return source, score_maps.open_score_maps(path)


class Photographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Encoded images, as from `make_jpegs`."""

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
    """JPEGs of SIZE, 55 to 65 KB: random crops of photographs with the noise of a camera."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        height = int(rng.integers(330, 427))
        width = height * SIZE[1] // SIZE[0]
        top, left = rng.integers(0, 427 - height + 1), rng.integers(0, 640 - width + 1)
        crop = PIL.Image.fromarray(photograph[top : top + height, left : left + width])
        pixels = np.asarray(crop.resize(SIZE[::-1], PIL.Image.BICUBIC), np.float32)
        pixels = pixels + rng.normal(0, 4, (*SIZE, 1))
        image = PIL.Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
        for quality in range(80, 97, 2):
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=quality)
            if stream.tell() > 55_000:
                break
        yield stream.getvalue()


def count_images(batches: Iterator) -> int:
    return len(next(batches).label)


def pillow_loop(encoded: list[bytes], image_size: tuple[int, int]) -> int:
    """Decode, random crop and bicubic resize of every image: what one would write first."""
    rng = np.random.default_rng(0)
    for item in encoded:
        image = PIL.Image.open(io.BytesIO(item)).convert("RGB")
        width, height = image.size
        w, h = width + 1, height + 1
        while w > width or h > height:
            area = rng.uniform(0.08, 1) * width * height
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        crop = image.crop((left, top, left + w, top + h))
        np.asarray(crop.resize(image_size[::-1], PIL.Image.BICUBIC))
    return len(encoded)


def rate(work: Callable[[], int], seconds: float) -> dict[str, float]:
    """Images a second of wall-clock time and of this process's processor time."""
    settle()
    for _ in range(WARM):
        work()
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        count += work()
    return {"wall": count / (time.perf_counter() - wall), "cpu": count / (time.process_time() - cpu)}


def settle() -> None:
    """Wait until pipelines that were read before have filled their buffers and cost nothing any more."""
    used = -1.0
    while time.process_time() - used > 0.01:
        used = time.process_time()
        time.sleep(0.2)


def measure_stages(source, maps, image_size, augment, seconds: float) -> dict[str, float]:
    """Milliseconds of processor time an image: reading and parsing, decode + crop + resize, and the rest of
    the augmentation."""
    options = dict(augment)
    policy = parse_policy(options.pop("randaugment", ""))
    plain = {k: v for k, v in options.items() if k not in ("three_augment", "color_jitter")}
    map_records = maps.records_of(source)
    line = order.make_order(
        source.shard_lengths,
        seed=0,
        batch_size=BATCH,
        record_bytes=source.record_bytes,
        shuffle_bytes=2 << 30,
    )

    def records(shard, offset):
        pairs = {"image": source.records(shard, offset), "map": map_records(shard, offset)}
        return tf.data.Dataset.zip(pairs)

    def seen(image, seed, **kwargs):
        pixels, geometry = transforms.train_image(image, seed, image_size=image_size, **kwargs)
        return pixels[0, 0, 0], geometry

    def stage(transform):
        def prepare(raw, counter):
            image, score_map = source.parse(raw["image"]), maps.parse(raw["map"])
            return transform(image["image"], tf.stack([tf.constant(0, tf.int64), counter])), score_map[
                "value"
            ]

        data = order.ordered_records(records, line).map(prepare, num_parallel_calls=1).batch(BATCH)
        settings = tf.data.Options()
        settings.threading.private_threadpool_size = 1
        settings.threading.max_intra_op_parallelism = 1
        iterator = iter(data.with_options(settings))
        step = lambda: len(next(iterator)[1])
        step()
        return 1e3 / max(rate(step, seconds / 3 / ROUNDS)["cpu"] for _ in range(ROUNDS))

    reading = stage(lambda image, seed: tf.strings.length(image))
    resizing = stage(lambda image, seed: seen(image, seed, **plain))
    augmenting = stage(lambda image, seed: seen(image, seed, **options, randaugment_policy=policy))
    return {
        "read": reading,
        "decode_crop_resize": resizing - reading,
        "augment": augmenting - resizing,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
