"""Trains (or resumes) a run, or evaluates one.

python -m tlvit.main --config=configs/lvvit_s.py --workdir=DIR [--mode=train|eval] [--config.KEY=VALUE …]

KEY is one of configs/common.py, or model.options.NAME with any option of the model class, such as
--config.model.options.depth=12.
"""

import ast
import json
import logging
import pathlib
import re
import sys
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from tlvit.training import loop as train
from tlvit.training.evaluation import evaluate_checkpoint
from tlvit.training.run_log import start_logging

FLAGS = flags.FLAGS
EXIT_STOPPED = 75  # EX_TEMPFAIL, asked to stop early: a job scheduler may start the same command again
log = logging.getLogger("tlvit")

config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/lvvit_s.py.", lock_config=True)
flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, report. The same folder resumes."
)
flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train (or resume), or evaluate the run's weights.")
flags.DEFINE_string(
    "checkpoint", None, "With --mode=eval: a model folder or PyTorch file in place of the workdir's."
)
flags.DEFINE_bool(
    "multihost", False, "One of several processes: SLURM, GKE, TPU pods and Open MPI are detected."
)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(arguments[1:])}")
    evaluating = FLAGS.mode == "eval"
    if FLAGS.checkpoint and not evaluating:
        raise app.UsageError(
            "--checkpoint goes with --mode=eval; to start from weights: --config.model.init_from"
        )
    if not (FLAGS.workdir or FLAGS.checkpoint):
        raise app.UsageError("--workdir is missing" + (", or --checkpoint" if evaluating else ""))
    if FLAGS.multihost:
        jax.distributed.initialize()
    start_logging(None if evaluating else pathlib.Path(FLAGS.workdir))
    try:
        if evaluating:
            print_evaluation(FLAGS.checkpoint or FLAGS.workdir)
            return
        result = train.train(FLAGS.config, FLAGS.workdir)
    except (ValueError, TypeError, FloatingPointError, FileNotFoundError, ImportError) as error:
        log.error("%s: %s", type(error).__name__, error)
        log.debug("where", exc_info=error)
        sys.exit(1)
    if not result.finished:
        sys.exit(EXIT_STOPPED)
    if jax.process_count() == 1:
        draw_report(pathlib.Path(FLAGS.workdir))


def draw_report(workdir: pathlib.Path) -> None:
    from tlvit import visualize

    try:
        log.info("drawn: %s", visualize.report(workdir))
    except Exception as error:  # the run is finished and saved: a picture must not make it fail
        log.warning("no report.png: %s", error)


def parse_flags(arguments: list[str]) -> list[str]:
    """Reads the flags, options of the model that its recipe does not name among them; ends the program with a
    sentence where one is wrong."""
    # ml_collections takes only keys that a config has, and looks for them in sys.argv, too.
    pattern = re.compile(r"--?config\.model\.options\.(\w+)=(.*)", re.DOTALL)
    options = [match.groups() for a in arguments if (match := pattern.fullmatch(a))]
    sys.argv[:] = [a for a in arguments if not pattern.fullmatch(a)]
    try:
        rest = FLAGS(sys.argv)
        with FLAGS.config.model.options.unlocked():
            for name, text in options:
                FLAGS.config.model.options[name] = _literal(text)
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps one in another
            error = error.args[0]
        said = str(error.args[0] if isinstance(error, KeyError) else error).strip()
        said = re.sub(r"\n*Traceback \(most recent call last\):\n( .*\n)+", " ", said)
        sys.exit(f"{type(error).__name__}: {said}\n(--help lists the flags, configs/common.py the keys)")
    return rest


def _literal(text: str) -> Any:
    """Python's value of "12", "0.1", "(2, 1)" or "None"; other text is itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def print_evaluation(path: str) -> None:
    """Evaluates a run's averaged and raw weights, or the weights of a file; the last line printed is JSON."""
    found = {}
    both = (pathlib.Path(path) / "checkpoints").is_dir() and FLAGS.config.ema.decay > 0
    for name, ema in (("ema", True), ("raw", False)) if both else (("weights", None),):
        sums = found[name] = evaluate_checkpoint(path, FLAGS.config, ema=ema)
        real = f", ReaL {sums['real']:.2f}%" if "real" in sums else ""
        log.info(
            "%s: top-1 %.2f%%, top-5 %.2f%%%s on %d images",
            f"{name} weights" if both else path, sums["top1"], sums["top5"], real, sums["count"],
        )  # fmt: skip
    print(json.dumps({"checkpoint": str(path), **found}))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
