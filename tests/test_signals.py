"""Signals while a training command imports its libraries, and while Python shuts down."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

JAX = "import os, signal; os.kill(os.getpid(), signal.{}); print('not stopped')"


@pytest.mark.parametrize("command", [["tlvit.main"], ["tlvit", "train"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_imports_is_a_request_to_stop(tmp_path, command, number):
    """The first heavy import is a file that sends the signal."""
    (tmp_path / "jax.py").write_text(JAX.format(number.name))
    done = subprocess.run(
        [sys.executable, "-m", *command, "--config=digits", f"--workdir={tmp_path}/w"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 75, done.stderr
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert done.stderr == f"stopped by {name}. The same command starts again or resumes.\n"
    assert done.stdout == ""


def test_a_signal_while_python_shuts_down_does_not_change_the_exit_status(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from tlvit.signals import ignore_until_exit\n"
        "class Late:\n"
        "    def __del__(self):\n"  # of the module's globals: after Python's own handlers are removed
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.modules['late'] = Late()\n"
        "ignore_until_exit()\n"
        "sys.exit(75)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, "")
