"""Whoever waits for a backend still hears of signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from zeroopt.collectives.patience import wait_patiently


class StoppedError(Exception):
    """Raised by the handler of a signal."""


@pytest.fixture
def signals() -> Iterator[list[int]]:
    """Heard of SIGUSR1, of which the second raises."""
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        heard.append(number)
        if len(heard) == 2:
            raise StoppedError

    before = signal.signal(signal.SIGUSR1, hear)
    yield heard
    signal.signal(signal.SIGUSR1, before)


def send_when(begun: threading.Event) -> None:
    """A signal to the main thread."""
    main = threading.main_thread().ident
    assert main is not None
    begun.wait(300)
    signal.pthread_kill(main, signal.SIGUSR1)


def test_a_call_is_made_in_another_thread_and_its_value_comes_back() -> None:
    for value in (1, None):
        assert wait_patiently(lambda value=value: (value, threading.current_thread() is threading.main_thread())) == (
            value,
            False,
        )


def test_other_threads_hear_of_no_signals() -> None:
    made_in: list[threading.Thread] = []
    thread = threading.Thread(target=lambda: made_in.append(wait_patiently(threading.current_thread)))
    thread.start()
    thread.join()
    assert made_in == [thread]


def test_a_handler_runs_while_the_call_goes_on(signals: list[int]) -> None:
    begun, heard = threading.Event(), threading.Event()

    def wait() -> int:
        begun.set()
        while not signals:
            heard.wait(0.001)
        return len(signals)

    sender = threading.Thread(target=send_when, args=[begun])
    sender.start()
    assert wait_patiently(wait) == 1
    sender.join()


def test_a_handler_that_raises_ends_the_wait_and_not_the_call(signals: list[int]) -> None:
    signals.append(0)
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert may_end.wait(300)
        ended.set()

    sender = threading.Thread(target=send_when, args=[begun])
    sender.start()
    with pytest.raises(StoppedError):
        wait_patiently(wait)
    sender.join()
    assert not ended.is_set()
    assert wait_patiently(lambda: 7) == 7, "another thread waits meanwhile"
    may_end.set()
    assert ended.wait(300)
