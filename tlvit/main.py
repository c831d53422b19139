"""Trains or resumes a run, or evaluates a checkpoint.

    tlvit train --config=lvvit_s --workdir=/runs/lvvit_s --config.data.score_maps=/data/score_maps
    tlvit train --config=my_recipe.py --workdir=/runs/mine --config.optim.learning_rate=8e-4
    tlvit eval --workdir=/runs/lvvit_s
    tlvit eval --config=lvvit_s --checkpoint=lvvit_s.pth.tar

`tlvit train` and `tlvit eval` are `python -m tlvit.main` with --mode=train and --mode=eval.

--config is a recipe file or the name of a shipped recipe, with :VARIANT for recipes that have variants. A
workdir keeps the settings of its run in config.json; without --config these are used. Every setting is
overridden with --config.SETTING=VALUE, and any option of the model class with
--config.model.options.NAME=VALUE. The same command resumes a run. The exit status is 75 if a run was asked to
stop (Ctrl-C, SIGTERM) and saved its state.
"""

import sys

if __name__ == "__main__" and "--mode=eval" not in sys.argv:  # before the imports, which take seconds
    from tlvit.signals import stop_quietly

    stop_quietly()

import difflib
import json
import logging
import pathlib
import re
import textwrap
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from tlvit import command
from tlvit import config as settings
from tlvit.files import as_path
from tlvit.host_memory import keep_freed_memory
from tlvit.recipes import load_recipe, load_workdir, load_writer, override, recipe_names, split_overrides
from tlvit.signals import EXIT_STOPPED, ignore_until_exit
from tlvit.training.evaluation import evaluate_checkpoint
from tlvit.training.loop import ProfileWindow, train
from tlvit.training.run_log import start_logging
from tlvit.training.tasks import TASKS

FLAGS = ("config", "workdir", "mode", "checkpoint", "weights", "profile", "writer", "multihost", "debug")
log = logging.getLogger("tlvit")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if any(a in ("-h", "-help", "--help", "--helpfull") for a in arguments):
        return command.run(lambda: print(help_text()) or 0)
    status = command.EXIT_INTERRUPTED if "--mode=eval" in arguments else EXIT_STOPPED
    return command.run(lambda: _run(arguments), debug="--debug" in arguments, interrupted=status)


def _run(arguments: Sequence[str]) -> int:
    options = parse_flags(arguments)
    config = settings.resolve(options.config)
    if options.multihost:
        seconds = config.mesh.heartbeat_timeout
        jax.distributed.initialize(heartbeat_timeout_seconds=seconds, shutdown_timeout_seconds=seconds)
    keep_freed_memory(config.batch_size, config.image_size)  # before the log, which starts JAX
    if options.mode == "eval":
        start_logging()
        print_evaluation(options.checkpoint or options.workdir, config, options.weights)
        return 0
    command.check_writable(options.workdir, folder=True)
    start_logging(as_path(options.workdir))
    writers = []
    if options.writer and jax.process_index() == 0:
        writers.append(load_writer(options.writer, options.workdir, settings.to_dict(config)))
    result = train(config, options.workdir, profile=parse_profile(options.profile), writers=writers)
    if not result.finished:
        return EXIT_STOPPED
    if jax.process_count() == 1:
        draw_report(as_path(options.workdir))
    return 0


def parse_flags(arguments: Sequence[str]) -> flags.FlagValues:
    """Reads the flags. `config` of the result has the settings: of the recipe or the workdir, overridden.

    Raises:
      ValueError: a flag, recipe or setting is wrong or missing.
    """
    others, overrides = split_overrides(arguments)
    options = _define_flags()
    try:
        unknown = options(["tlvit", *others])[1:]
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown_flag(error.flagname)) from error
    except flags.Error as error:
        raise ValueError(f"{error}.") from error
    if unknown:
        text = " ".join(unknown)
        if unknown[0].partition(":")[0] in recipe_names():
            text += f"; did you mean --config={unknown[0]}?"
        raise ValueError(f"unknown arguments: {text} (--help shows examples and all flags)")
    _check_flags(options)
    options.config = _settings(options)
    if options.mode == "eval":  # a file's own resize and crop count, unless a flag sets other ones
        options.config.eval.crop_pct, options.config.eval.interpolation = 0.0, "auto"
    for name, text in overrides:
        override(options.config, name, text)
    return options


def print_evaluation(path: str, config: settings.Config, weights: str) -> None:
    """Evaluates a checkpoint and prints the result as JSON in the last line.

    Args:
      path: a workdir, a model folder or a PyTorch file.
      config: data and evaluation settings.
      weights: "ema" (averaged), "raw" (not averaged), or "auto": of a workdir both, otherwise the file's.
    """
    run = (as_path(path) / "checkpoints").is_dir()
    both = weights == "auto" and run and config.ema.decay > 0
    found = {}
    for kind in ("ema", "raw") if both else (weights,):
        name = "weights" if kind == "auto" else kind
        values = found[name] = evaluate_checkpoint(path, config, weights=kind)
        subject, text = path if kind == "auto" else f"{kind} weights", TASKS[config.task].describe(values)
        log.info("%s: %s on %d images", subject, text, values["count"])
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
    options = _define_flags()
    lines = [__doc__.strip(), "", f"Recipes: {', '.join(recipe_names())}", "", "Flags:"]
    for name in FLAGS:
        default = options[name].default
        shown = str(default).lower() if isinstance(default, bool) else default
        lines.append(f"  --{name:<12}{options[name].help} (default: {shown or 'none'})")
    lines += ["", "Settings (--config.NAME=VALUE) with default and range; a recipe changes some defaults:"]
    for name, value, limits, meaning in settings.settings():
        shown = "empty" if value in ("", (), {}) else value
        lines.append(f"  {name:<27} {shown}" + (f"   ({limits})" if limits else ""))
        lines.append(textwrap.fill(meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    own = {"flag_values": values}
    text, enum, switch = flags.DEFINE_string, flags.DEFINE_enum, flags.DEFINE_bool
    text("config", None, "Recipe file, or name of a shipped recipe; else the workdir's config.json.", **own)
    text("workdir", None, "Folder of the run: checkpoints, metrics, report.", **own)
    enum("mode", "train", ["train", "eval"], "Train (or resume), or evaluate.", **own)
    text("checkpoint", None, "With --mode=eval: a workdir, model folder or file to evaluate.", **own)
    enum(
        "weights",
        "auto",
        ["auto", "ema", "raw"],
        "With --mode=eval: ema (averaged), raw (not averaged) or auto (both for a workdir, else those of the "
        "file).",
        **own,
    )
    text(
        "profile",
        None,
        "START:STEPS, for example 100:5: write a profiler trace of STEPS steps from step START on.",
        **own,
    )
    text(
        "writer", None, "Python file whose make_writer(workdir, config) returns an experiment tracker.", **own
    )
    switch("multihost", False, "Run as one of several processes (SLURM, GKE, TPU pods, Open MPI).", **own)
    switch("debug", False, "Print the traceback of an error.", **own)
    return values


def _check_flags(options: flags.FlagValues) -> None:
    if options.checkpoint and options.mode != "eval":
        raise ValueError(
            "--checkpoint needs --mode=eval; to start training from weights: --config.model.init_from=PATH"
        )
    if not (options.workdir or options.checkpoint):
        raise ValueError("--workdir is missing" + (", or --checkpoint" if options.mode == "eval" else ""))
    parse_profile(options.profile)


def _settings(options: flags.FlagValues) -> ConfigDict:
    """The settings of the recipe; without one, those of the workdir."""
    if options.config:
        return load_recipe(options.config)
    path = options.checkpoint or options.workdir
    found = load_workdir(path)
    if found is None and options.mode == "eval" and not as_path(path).exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if found is None:
        known = ", ".join(recipe_names())
        raise ValueError(
            f"--config is missing, and {path} has no config.json: give a recipe, such as {known}."
        )
    return found


def _unknown_flag(name: str) -> str:
    """The message about a flag that does not exist, with the flag or setting that may be meant."""
    paths = settings.setting_types()
    close = [f"--config.{path}" for path in paths if path.rpartition(".")[2] == name.replace("-", "_")]
    close += [f"--{flag}" for flag in difflib.get_close_matches(name, FLAGS, n=1)]
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown flag --{name}{hint} (--help shows examples and all flags)"


if __name__ == "__main__":
    exit_status = main()
    ignore_until_exit()
    sys.exit(exit_status)
