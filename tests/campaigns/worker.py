"""Runs commands of tlvit one after the other in a process that can be killed, and reports what each did.

A start of Python and its libraries takes seconds and a refusal takes milliseconds, so the process is kept
until a command exceeds its time.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

from tiny_runs import command


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
      status: its exit status; None if it was killed because it took too long.
      text: what it printed, both streams.
      seconds: how long it took.
      megabytes: the most memory it used, above that before it.
    """

    status: int | None
    text: str
    seconds: float
    megabytes: float


class Worker:
    """A process that runs commands. Use it in a `with` statement."""

    def __enter__(self) -> "Worker":
        self._process = None
        return self

    def __exit__(self, *_) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()

    def run(self, arguments: list[str], *, cwd: pathlib.Path, limit: float = 120) -> Outcome:
        """Runs `tlvit ARGUMENTS` in the folder `cwd`, at most `limit` seconds long."""
        if self._process is None:
            program = command("campaigns.worker")
            program["env"]["PYTHONPATH"] += f":{pathlib.Path(__file__).parent.parent}"
            self._process = subprocess.Popen(
                **program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        with tempfile.NamedTemporaryFile("w+", errors="surrogateescape", suffix=".txt") as output:
            request = {"arguments": arguments, "cwd": str(cwd), "output": output.name}
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            timer = threading.Timer(limit, self._process.kill)
            timer.start()
            start, answer = time.monotonic(), self._process.stdout.readline()
            timer.cancel()
            text = pathlib.Path(output.name).read_text(errors="replace")
        if not answer:
            died = self._process.wait()
            self._process = None
            late = time.monotonic() - start >= limit
            return Outcome(None if late else died, text, time.monotonic() - start, 0.0)
        return Outcome(text=text, **json.loads(answer))


def serve() -> None:
    """Answers requests on the standard input until it is closed."""
    from tlvit import __main__ as tlvit
    from tlvit import annotate, convert, main, maps, predict, summary, visualize  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        os.chdir(request["cwd"])
        file = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.close(file)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts at the present use
        before, start = memory("VmRSS"), time.monotonic()
        try:
            status = tlvit.main(request["arguments"])
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        used = memory("VmHWM") - before
        answer = {"status": status, "seconds": time.monotonic() - start, "megabytes": used}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def memory(field: str) -> float:
    """A field of /proc/self/status, MB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


if __name__ == "__main__":
    serve()
