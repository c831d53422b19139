"""Turns Ctrl-C and SIGTERM into a request to stop after the current step."""

import logging
import signal
from typing import Any

import jax

log = logging.getLogger("tlvit")


class StopRequest:
    """Inside its `with` block, the first Ctrl-C or SIGTERM only sets `requested`; a second Ctrl-C interrupts.

    In a job of several processes it does nothing: JAX's own notifier takes SIGTERM there, so that all
    processes stop at the same step (see `Checkpoints.preempted`).
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ():
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        log.info("%s: stopping after this step, then saving", signal.Signals(number).name)
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
