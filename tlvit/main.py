"""Trains or resumes a run, or evaluates a checkpoint.

    python -m tlvit.main --config=configs/lvvit_s.py --workdir=/runs/lvvit_s \\
        --config.data.score_maps=/data/score_maps --config.optim.learning_rate=8e-4
    python -m tlvit.main --config=lvvit_s --workdir=/runs/lvvit_s --mode=eval
    python -m tlvit.main --config=lvvit_s --checkpoint=lvvit_s.pth.tar --mode=eval

--config is a recipe file or the name of a shipped recipe, with :VARIANT for recipes that have variants. Every
setting of tlvit/config.py is overridden with --config.SETTING=VALUE, and any option of the model class with
--config.model.options.NAME=VALUE. The same command resumes a run. The exit status is 75 if a run was asked to
stop (Ctrl-C, SIGTERM) and saved its state.
"""

import sys

if __name__ == "__main__" and "--mode=eval" not in sys.argv:  # before the imports, which take seconds
    from tlvit.signals import stop_quietly

    stop_quietly()

import ast
import json
import logging
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from tlvit import config as settings
from tlvit.signals import EXIT_STOPPED
from tlvit.training.evaluation import evaluate_checkpoint
from tlvit.training.loop import ProfileWindow, train
from tlvit.training.run_log import start_logging
from tlvit.training.stop_request import Stopped

RECIPE_FOLDERS = (  # of the installed package, and of a checkout
    pathlib.Path(__file__).parent / "configs",
    pathlib.Path(__file__).parent.parent / "configs",
)
log = logging.getLogger("tlvit")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if any(a in ("-h", "-help", "--help", "--helpfull") for a in arguments):
        print(help_text())
        return 0
    try:
        options = parse_flags(arguments)
    except ValueError as error:
        print(f"error: {error}\n(--help shows examples and all flags)", file=sys.stderr)
        return 1
    if options.multihost:
        jax.distributed.initialize()
    try:
        start_logging(pathlib.Path(options.workdir) if options.mode == "train" else None)
        config = settings.resolve(options.config)
        if options.mode == "eval":
            print_evaluation(options.checkpoint or options.workdir, config, options.weights)
            return 0
        result = train(config, options.workdir, profile=parse_profile(options.profile))
    except (ValueError, TypeError, FloatingPointError, OSError, ImportError) as error:
        log.error("%s: %s", type(error).__name__, error)
        log.debug("traceback", exc_info=error)
        return 1
    except Stopped as stopped:
        log.info("%s", stopped)
        return EXIT_STOPPED
    if not result.finished:
        return EXIT_STOPPED
    if jax.process_count() == 1:
        draw_report(pathlib.Path(options.workdir))
    return 0


def parse_flags(arguments: Sequence[str]) -> flags.FlagValues:
    """Reads the flags, including overrides of settings and options of the model.

    Raises:
      ValueError: a flag, recipe or setting is wrong or missing.
    """
    # ml_collections only accepts settings that the recipe has; the model's options are free.
    pattern = re.compile(r"--?config\.model\.options\.(\w+)=(.*)", re.DOTALL)
    model_options = [match.groups() for a in arguments if (match := pattern.fullmatch(a))]
    argv = ["tlvit", *(_resolve_recipe(a) for a in arguments if not pattern.fullmatch(a))]
    options = _define_flags(argv)
    try:
        unknown = options(argv)[1:]
        if unknown:
            raise ValueError(f"unknown arguments: {' '.join(unknown)}")
        if options.config is None:
            raise ValueError("--config is missing: a recipe file or one of " + ", ".join(recipe_names()))
        with options.config.model.options.unlocked():
            for name, text in model_options:
                options.config.model.options[name] = _literal(text)
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(_sentence(error)) from error
    _check_flags(options)
    return options


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted({path.stem for folder in RECIPE_FOLDERS for path in folder.glob("*.py")} - {"__init__"})


def print_evaluation(path: str, config: settings.Config, weights: str) -> None:
    """Evaluates a checkpoint and prints the result as JSON in the last line.

    Args:
      path: a workdir, a model folder or a PyTorch file.
      config: data and evaluation settings.
      weights: "ema", "raw", or "auto": of a workdir both the average and the raw weights, otherwise the
        file's.
    """
    run = (pathlib.Path(path) / "checkpoints").is_dir()
    both = weights == "auto" and run and config.ema.decay > 0
    found = {}
    for kind in ("ema", "raw") if both else (weights,):
        name = "weights" if kind == "auto" else kind
        sums = found[name] = evaluate_checkpoint(path, config, weights=kind)
        real = f", ReaL {sums['real']:.2f}%" if "real" in sums else ""
        log.info(
            "%s: top-1 %.2f%%, top-5 %.2f%%%s on %d images",
            path if kind == "auto" else f"{kind} weights", sums["top1"], sums["top5"], real, sums["count"],
        )  # fmt: skip
    print(json.dumps({"checkpoint": str(path), **found}))


def parse_profile(text: str | None) -> ProfileWindow | None:
    """START:STEPS, for example 100:5.

    Raises:
      ValueError: anything else.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or min(map(int, match.groups())) < 1:
        raise ValueError(f"--profile is START:STEPS, for example 100:5, not {text!r}.")
    return ProfileWindow(start=int(match[1]), steps=int(match[2]))


def draw_report(workdir: pathlib.Path) -> None:
    """Draws report.png. A finished run is not a failure because its picture cannot be drawn."""
    from tlvit import visualize

    try:
        log.info("drew %s", visualize.report(workdir))
    except Exception as error:
        log.warning("no report.png: %s", error)


def help_text() -> str:
    """The text of --help."""
    options = _define_flags(["tlvit"])
    lines = [__doc__.strip(), "", f"Recipes: {', '.join(recipe_names())}", "", "Flags:"]
    for name in ("config", "workdir", "mode", "checkpoint", "weights", "profile", "multihost"):
        default = options[name].default
        lines.append(f"  --{name:<12}{options[name].help}" + (f" (default: {default})" if default else ""))
    return "\n".join(lines)


def _define_flags(argv: Sequence[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    own = {"flag_values": values}
    config_flags.DEFINE_config_file(
        "config", None, "Recipe file, or name of a shipped recipe.", sys_argv=list(argv), **own
    )
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, report.", **own)
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train (or resume), or evaluate.", **own)
    flags.DEFINE_string(
        "checkpoint", None, "With --mode=eval: a workdir, model folder or file to evaluate.", **own
    )
    flags.DEFINE_enum("weights", "auto", ["auto", "ema", "raw"], "With --mode=eval: which weights.", **own)
    flags.DEFINE_string("profile", None, "START:STEPS, write a profiler trace of these steps.", **own)
    flags.DEFINE_bool("multihost", False, "One of several processes (SLURM, GKE, TPU pods, Open MPI).", **own)
    return values


def _check_flags(options: flags.FlagValues) -> None:
    if options.checkpoint and options.mode != "eval":
        raise ValueError(
            "--checkpoint needs --mode=eval; to start training from weights: --config.model.init_from=PATH"
        )
    if not (options.workdir or options.checkpoint):
        raise ValueError("--workdir is missing" + (", or --checkpoint" if options.mode == "eval" else ""))
    parse_profile(options.profile)


def _resolve_recipe(argument: str) -> str:
    """--config=NAME[:VARIANT] of a shipped recipe -> --config=PATH[:VARIANT]; other arguments as they are."""
    match = re.fullmatch(r"(--?config=)([^:]+)((?::.*)?)", argument)
    if not match or match[2].endswith(".py"):
        return argument
    for folder in RECIPE_FOLDERS:
        path = folder / f"{match[2]}.py"
        if path.exists():
            return f"{match[1]}{path}{match[3]}"
    raise ValueError(
        f"{match[2]!r} is not a shipped recipe or a .py file; recipes: {', '.join(recipe_names())}"
    )


def _literal(text: str) -> Any:
    """The Python value of "12", "0.1", "(2, 1)" or "None"; other text stays text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _sentence(error: BaseException) -> str:
    """The message of an error of ml_collections, without the tracebacks and errors that it wraps."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0] if isinstance(error, KeyError) else error).strip()
    text = re.sub(r"\n*Traceback \(most recent call last\):\n( .*\n)+", " ", text)
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.exit(main())
