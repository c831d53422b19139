"""Ends a command that is asked to stop while its libraries are imported, which takes seconds."""

import os
import signal

EXIT_STOPPED = 75  # EX_TEMPFAIL: a job scheduler may start the same command again


def stop_quietly() -> None:
    """From now on Ctrl-C and SIGTERM end the process with a sentence and status 75 instead of a traceback.

    Only for a process that has nothing to save. A run replaces this when it starts (`StopRequest`).
    """
    signal.signal(signal.SIGINT, _end)
    signal.signal(signal.SIGTERM, _end)


def ignore_until_exit() -> None:
    """From now on Ctrl-C and SIGTERM are ignored: the work is saved, and the process is about to end.

    Without this, a second Ctrl-C would replace the exit status while Python shuts down, which takes seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end(number: int, frame: object) -> None:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    os.write(2, f"stopped by {name}. The same command starts again or resumes.\n".encode())
    os._exit(EXIT_STOPPED)  # an exception inside of an import becomes another one
