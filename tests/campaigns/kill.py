"""Stops runs at random moments, again and again, and compares what they leave with an uninterrupted run."""

import pathlib
import random
import signal
import subprocess
import tempfile
import time

import tiny_runs
from tiny_runs import annotate_command, check_equal_losses, check_equal_states, command, student_command

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STOPPED = 75


def stop_somewhere(module: str, arguments: list[str], folder: pathlib.Path, rng: random.Random) -> None:
    """Starts a command and sends it a signal at a random moment.

    The moment is a line of its output, chosen at random among those of a whole run, and up to a second more,
    so starts, compilations, steps, saves and evaluations are all hit.

    Raises:
      AssertionError: the command ended in a way that it should not.
    """
    number, moment = rng.choice(SIGNALS), rng.randint(0, 30)
    twice = rng.random() < 0.2
    output = folder / "out.txt"
    with output.open("w") as file:
        process = subprocess.Popen(**command(module, *arguments), stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None and output.read_text(errors="replace").count("\n") < moment:
            time.sleep(0.01)
        time.sleep(rng.random())
        process.send_signal(number)
        if twice:
            time.sleep(rng.random() / 2)
            process.send_signal(number)
        status = process.wait(timeout=300)
    text = output.read_text(errors="replace")
    after = f"{number.name}{' twice' if twice else ''} after line {min(moment, text.count(chr(10)))}"
    if number == signal.SIGKILL:
        assert status in (0, -signal.SIGKILL), f"{after}: status {status}\n{text}"
    else:
        assert "Traceback" not in text, f"{after}: status {status}\n{text}"
        asked = (0, STOPPED) if module == "tlvit.main" else (0, 130, -signal.SIGINT, -signal.SIGTERM)
        assert status in asked, f"{after}: status {status}\n{text}"


def train_with_stops(scene: pathlib.Path, seed: int, stops: int) -> None:
    """Stops a training run `stops` times, lets it end, and compares it with the scene's bit for bit."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        workdir = pathlib.Path(name) / "run"
        arguments = student_command(scene, workdir)
        for _ in range(stops):
            stop_somewhere("tlvit.main", arguments, pathlib.Path(name), rng)
        tiny_runs.run("tlvit.main", *arguments)
        check_equal_states(workdir, scene / "student")
        check_equal_losses(workdir, scene / "student")
        left = [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]
        assert not [file for file in left if "tmp" in file], left


def annotate_with_stops(scene: pathlib.Path, seed: int, stops: int) -> None:
    """Stops an annotation `stops` times, lets it end, and compares its files with those of another run, which
    is not stopped, byte for byte."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        maps = pathlib.Path(name) / "maps"
        arguments = annotate_command(scene / "data", scene / "annotator", maps)
        for _ in range(stops):
            stop_somewhere("tlvit.annotate", arguments, pathlib.Path(name), rng)
        tiny_runs.run("tlvit.annotate", *arguments)
        whole = pathlib.Path(name) / "whole"
        tiny_runs.run("tlvit.annotate", *annotate_command(scene / "data", scene / "annotator", whole))
        found, wanted = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (maps, whole))
        assert found == wanted
