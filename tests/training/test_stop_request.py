"""Requests to stop: the first signal, the second one, and signals whose exception Python ignored."""

import os
import signal

import pytest

from tlvit.training.stop_request import StopRequest, StopWatched


def signals():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_requests_a_stop(number):
    before = signals()
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert signals() != before
    assert signals() == before


def test_a_second_ctrl_c_interrupts_at_once():
    before = signals()

    def interrupted_twice():
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat it: still only a request
            assert stop.requested
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("not interrupted")

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert signals() == before


def test_before_defer_a_signal_interrupts():
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), StopRequest(interrupts=True):
        os.kill(os.getpid(), signal.SIGTERM)
    with StopRequest(interrupts=True) as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_watching_ends_with_the_next_signal():
    """A signal from before is none: it was asked for something else."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(stop.watch(range(3))) == [0, 1, 2]
        watched = stop.watch(range(3))
        assert next(watched) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopWatched):
            next(watched)


class Terminates:
    """Sends SIGTERM to this process from a destructor, whose exceptions Python ignores."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("deferred", "expected"), [(False, KeyboardInterrupt), (True, StopWatched)])
def test_a_signal_whose_exception_is_ignored_is_noticed(deferred, expected):
    with StopRequest(interrupts=True) as stop:
        if deferred:
            stop.defer()
        watched = stop.watch(range(3))
        assert next(watched) == 0
        last_reference = Terminates()
        del last_reference
        with pytest.raises(expected):
            next(watched)
