"""Turns Ctrl-C and SIGTERM into a request to stop after the current step."""

import logging
import signal
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax

log = logging.getLogger("tlvit")
T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """A signal ended a run before it could save its last steps. The message says which checkpoint is kept.

    Like KeyboardInterrupt it is not an `Exception`, so that nothing takes it for an unreadable file.
    """


class StopWatched(Exception):
    """`StopRequest.watch` ended early, because a stop was requested."""


class StopRequest:
    """Inside its `with` block, the first Ctrl-C or SIGTERM only sets `requested`; a second Ctrl-C interrupts.

    In a job of several processes it does nothing: JAX's own notifier takes SIGTERM there, so that all
    processes stop at the same step (see `Checkpoints.preempted`).

    Args:
      interrupts: at first, Ctrl-C and SIGTERM raise KeyboardInterrupt, until `defer` is called: during a
        setup there is nothing to save.

    Attributes:
      requested: whether there was a signal.
    """

    def __init__(self, *, interrupts: bool = False) -> None:
        self._signals = 0
        self._name = ""
        self._interrupts = interrupts
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self._signals > 0

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ():
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on the first signal is a request."""
        self._interrupts = False

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """Passes items on until there is a signal.

        Raises:
          StopWatched: there was a signal since the first item, and it is only a request.
          KeyboardInterrupt: there was one that interrupts. Python ignores an exception of a signal handler
            that runs during a callback or a destructor, so it is raised again.
        """
        before = self._signals
        for item in items:
            if self._signals > before:
                raise KeyboardInterrupt(self._name) if self._interrupts else StopWatched
            yield item

    def _receive(self, number: int, frame: object) -> None:
        self._signals += 1
        self._name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if self._interrupts or (number == signal.SIGINT and self._signals > 1):
            raise KeyboardInterrupt(self._name)
        if self._signals == 1:
            log.info("%s: stopping after this step, then saving", signal.Signals(number).name)
