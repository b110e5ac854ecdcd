"""A thread that takes collectives of several rounds from one round to the next.

What a rank sends in a round depends on what has come in the one before, and Gloo's messages do not tell that they have come, but to who
waits for them. Were that done where results are asked for, every round of every rank would wait for the busiest Python of all; here
the rounds of one collective go on beside backward, and those of a gather though this rank may already do something else.

Collectives of one driver run one after the other, in the order of their start. Waiting and summing need no interpreter lock.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import ClassVar

from ..errors import CollectiveError
from .messages import AT_EXIT_S
from .pending import PendingCollective


class Driven(PendingCollective):
    """A collective that a driver runs.

    Args:
        rounds: all that there is to do, until nothing reads this rank's input any more. It raises CollectiveError when a rank does not
            do its part.

    Attributes:
        is_over: it is through, or has failed.
    """

    def __init__(self, rounds: Callable[[], None]) -> None:
        self._rounds: Callable[[], None] | None = rounds
        self.is_over = threading.Event()
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Called by the driver."""
        assert self._rounds is not None
        try:
            self._rounds()
        except BaseException as error:  # noqa: BLE001  told to whoever waits for the result
            self._failure = error
        self._rounds = None  # and what it keeps
        self.is_over.set()

    def finish(self) -> None:
        self.is_over.wait()
        if isinstance(self._failure, CollectiveError):
            raise CollectiveError(str(self._failure)) from self._failure
        if self._failure is not None:
            raise self._failure

    def is_past(self) -> bool:
        return self.is_over.is_set() and self._failure is None

    def wait_until_read(self) -> None:
        self.finish()


class Driver:
    """Runs what it is given, one after the other. Its thread is there from the first on, and ends with the driver."""

    _all: ClassVar[weakref.WeakSet[Driver]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Driven | None] = SimpleQueue()
        self._last: threading.Event | None = None  # whether the last one is over

    def start(self, driven: Driven) -> Driven:
        """Run it when those that were started before are over. Returns it."""
        if self._last is None:
            threading.Thread(target=_run_all, args=(self._waiting,), name="zeroopt rounds", daemon=True).start()
            weakref.finalize(self, self._waiting.put, None)
            self._all.add(self)
        self._last = driven.is_over
        self._waiting.put(driven)
        return driven

    def wait_at_exit(self, deadline: float) -> None:
        """Wait until all are over, but not for long."""
        if self._last is not None:
            self._last.wait(max(0.0, deadline - time.monotonic()))


def _run_all(waiting: SimpleQueue[Driven | None]) -> None:
    while (driven := waiting.get()) is not None:
        driven.run()
        del driven  # it keeps buckets


@atexit.register
def _finish_at_exit() -> None:
    """The other ranks may still need what this one passes on. It comes before messages that nobody has waited for."""
    deadline = time.monotonic() + AT_EXIT_S
    for driver in list(Driver._all):
        driver.wait_at_exit(deadline)
