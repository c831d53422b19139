"""Scores every cell of every image of a data set once, with a trained annotator; or reads published maps.

python -m tlvit.annotate --model=WORKDIR --data=imagenet2012 --split=train --out=/data/score_maps
python -m tlvit.annotate --import-pt=LABEL_DIR --data=imagenet2012 --split=train --out=/data/score_maps
python -m tlvit.annotate --check=/data/score_maps [--data=imagenet2012 --split=train]
"""

import argparse
import hashlib
import logging
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing, image_size_pair
from tlvit.checkpoints.torch_names import to_torch
from tlvit.data.score_maps.writer import ScoreMapWriter
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize
from tlvit.training import mesh as sharding
from tlvit.training.prefetch import to_global
from tlvit.training.run_log import duration, start_logging

log = logging.getLogger("tlvit")


def annotate(
    model: nnx.Module, info: ModelInfo, source, out: str | pathlib.Path, *, top_k: int = 5,
    batch_size: int = 64, image_size: tuple[int, int] | None = None, max_bad: float = 0.0,
    num_threads: int | None = None,
):  # fmt: skip
    """Writes the score maps of a source shard by shard; a second call goes on where the first one stopped.

    The image is squashed to `image_size`, so that a map covers the whole of it whatever its shape.

    Args:
      model: an annotator, with `dense_logits`.
      info: of the model.
      source: from `open_source`.
      out: folder of the maps.
      top_k: K, classes kept for each cell.
      batch_size: images at once; a multiple of this machine's devices.
      image_size: (height, width) given to the annotator; its own by default. Larger gives finer maps.
      max_bad: share of the images that may be unreadable; they are marked as having no map.
      num_threads: that decode; None: one for each core.

    Returns:
      The ScoreMapInfo of the finished folder; in a run of several processes, None on all but the first.

    Raises:
      ValueError: the model is no annotator, its classes are not the source's, or the folder holds other maps.
    """
    from tlvit.data import pipeline

    if not hasattr(model, "dense_logits"):
        raise ValueError(f"{info.model} has no dense_logits, so it cannot score the cells of an image.")
    size = image_size or info.image_size
    mesh = sharding.make_mesh(jax.local_devices())
    if batch_size % mesh.devices.size:
        raise ValueError(f"A batch of {batch_size} images cannot be split over {mesh.devices.size} devices.")
    score, weights = _scorer(model, info.preprocessing, mesh, top_k=min(top_k, info.num_classes))
    grid = jax.eval_shape(score, weights, jax.ShapeDtypeStruct((batch_size, *size, 3), jnp.uint8))[0].shape[
        2:
    ]
    writer = ScoreMapWriter(
        str(out),
        source=source,
        annotator=info.model,
        annotator_hash=_fingerprint(model),
        top_k=min(top_k, info.num_classes),
        grid=grid,
        num_classes=info.num_classes,
    )
    done = writer.done_shards()
    # By the shards' numbers, not by what is left: another process may have finished one meanwhile.
    mine = range(jax.process_index(), len(source.shard_lengths), jax.process_count())
    todo = [shard for shard in mine if shard not in done]
    log.info(
        "%s scores %d images of %s at %dx%d: maps of %d x %d x %d; %d of %d shards are there already",
        info.model, source.num_examples, source.identity, *size, writer.info.top_k, *grid, len(done),
        len(source.shard_lengths),
    )  # fmt: skip
    agreed = images = 0
    start = time.perf_counter()
    for position, shard in enumerate(todo):
        keys, values, indices, read = [], [], [], []
        batches = pipeline.annotation_batches(
            source, shard, batch_size=batch_size, image_size=size, max_bad=max_bad, num_threads=num_threads
        )
        for item in batches:
            count = len(item.keys)
            value, index, best = jax.device_get(score(weights, to_global(item.batch.image, mesh)))
            keys += item.keys
            values.append(value[:count])
            indices.append(index[:count])
            whole = item.batch.mask[:count]
            read.append(whole)
            agreed += int(np.sum((best[:count] == item.batch.label[:count]) & whole))
            images += int(np.sum(whole))
        missing = ~np.concatenate(read)
        writer.write_shard(shard, keys, np.concatenate(values), np.concatenate(indices), missing=missing)
        elapsed = time.perf_counter() - start
        log.info(
            "shard %d/%d  %.0f images/s  mean map agrees with the label on %.1f%% of %d images  ETA %s",
            position + 1, len(todo), images / elapsed, 100 * agreed / images, images,
            duration(elapsed / (position + 1) * (len(todo) - position - 1)),
        )  # fmt: skip
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("score maps written")
    return writer.finalize() if jax.process_index() == 0 else None


def _scorer(model: nnx.Module, preprocessing: Preprocessing, mesh, *, top_k: int):
    """(jitted (weights, uint8 images) -> value [B, K, h, w], index [B, K, h, w], best class of the mean map
    [B], weights)."""
    net, params, stats = functionalize(model)
    weights = jax.device_put((params, stats), sharding.replicated(mesh))

    @jax.jit
    def score(weights, images):
        logits = net.bind(*weights).dense_logits(normalize(images, preprocessing.mean, preprocessing.std))
        value, index = jax.lax.top_k(logits.astype(jnp.float32), top_k)
        best = jnp.argmax(jnp.mean(logits, axis=(1, 2)), axis=-1)
        return jnp.moveaxis(value, -1, 1), jnp.moveaxis(index, -1, 1), best

    return score, weights


def _fingerprint(model: nnx.Module) -> str:
    """A hash of the weights, which tells two checkpoints of one annotator apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(to_torch(model).items()):
        digest.update(name.encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _parse(arguments)
    if options.multihost:
        jax.distributed.initialize()
    start_logging()
    try:
        from tlvit.data.score_maps import reader as score_maps
        from tlvit.data.sources import tfds as sources

        open_data = lambda: sources.open_source(options.data, options.split, data_dir=options.data_dir)
        if options.check:
            info = score_maps.verify(options.check, open_data() if options.data else None)
            log.info(
                "%s is whole: %d images (%d without a map) in %d shards, %d x %d x %d, by %s",
                options.check, info.num_images, info.num_missing, len(info.shards), info.top_k, *info.grid,
                info.annotator,
            )  # fmt: skip
            return 0
        if not options.import_pt:
            model, info = load(options.model, model=options.model_name, ema=False if options.raw else None)
        source = open_data()
        if options.import_pt:
            from tlvit.data.score_maps import published as import_pt

            found = import_pt.import_pt(
                options.import_pt,
                source,
                options.out,
                geometry=options.geometry,
                center_share=options.center_share,
                max_missing=options.max_missing,
                threads=options.threads,
            )
            log.info(
                "imported %d maps, %d images have none",
                found.num_images - found.num_missing,
                found.num_missing,
            )
            return 0
        size = image_size_pair(options.image_size) if options.image_size else None
        annotate(
            model,
            info,
            source,
            options.out,
            top_k=options.top_k,
            batch_size=options.batch_size,
            image_size=size,
            max_bad=options.max_missing,
            num_threads=options.threads,
        )
    except (ValueError, FileNotFoundError, ImportError) as error:
        log.error("%s", error)
        return 1
    log.info("done: %s", options.out)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tlvit.annotate", description="Write the score maps of a data set."
    )
    parser.add_argument("--model", help="the annotator: a workdir, a model folder or a PyTorch file")
    parser.add_argument("--model-name", help="of a PyTorch file, where its tensors do not tell")
    parser.add_argument("--raw", action="store_true", help="the raw weights where there is an average, too")
    parser.add_argument("--data", help='TFDS name, "digits", or a folder of ROOT/SPLIT/CLASS/IMAGE')
    parser.add_argument("--split", default="train")
    parser.add_argument("--data-dir", help="folder of the TFDS data sets")
    parser.add_argument("--out", help="folder of the score maps")
    parser.add_argument("--top-k", type=int, default=5, help="classes kept for each cell (5)")
    parser.add_argument("--image-size", help="NUMBER or HEIGHTxWIDTH; the annotator's own by default")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--multihost", action="store_true", help="one of several processes, each of which scores some shards"
    )
    parser.add_argument("--threads", type=int, help="that decode images; all cores by default")
    parser.add_argument(
        "--max-missing", type=float, default=0.0, help="share of images that may stay without a map"
    )
    parser.add_argument(
        "--import-pt", metavar="DIR", help="read the published per-image .pt maps instead of a model"
    )
    parser.add_argument(
        "--geometry", choices=["full", "center"], default="full", help="what imported maps cover"
    )
    parser.add_argument(
        "--center-share", type=float, default=1.0, help="with center: the annotator's crop_pct"
    )
    parser.add_argument(
        "--check",
        metavar="DIR",
        help="verify the maps in DIR instead: counts, checksums, ranges; with --data the images' keys, too",
    )
    options = parser.parse_args(arguments)
    needed = ("data", "out") if options.import_pt else ("model", "data", "out")
    missing = [f"--{name}" for name in needed if getattr(options, name) is None]
    if missing and not options.check:
        parser.error(f"{', '.join(missing)} missing")
    return options


if __name__ == "__main__":
    sys.exit(main())
