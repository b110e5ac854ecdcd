"""A thread that carries collectives on, whatever the rank's own thread does meanwhile.

What a rank sends in a round depends on what has come in the one before, and Gloo's messages do not tell that they have come, but to who
waits for them. Were that done where results are asked for, every round of every rank would wait for the busiest Python of all; here
the rounds of one collective go on beside backward, and those of a gather though this rank may already do something else. So it is where
a host's other ranks depend on what this one receives.

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
from .messages import exit_deadline
from .pending import PendingCollective


class Driven(PendingCollective):
    """A collective that a driver runs.

    Args:
        rounds: all that there is to do, until nothing reads this rank's input any more. It raises CollectiveError when a rank does not
            do its part.

    Attributes:
        is_over: it is through, or has failed.
        failure: by what.
    """

    def __init__(self, rounds: Callable[[], None]) -> None:
        self._rounds: Callable[[], None] | None = rounds
        self.is_over = threading.Event()
        self.failure: BaseException | None = None

    def run(self, failure: BaseException | None = None) -> None:
        """Called by the driver.

        Args:
            failure: of one before it, for which it fails, too.
        """
        assert self._rounds is not None
        self.failure = failure
        if failure is None:
            try:
                self._rounds()
            except BaseException as error:  # noqa: BLE001  told to whoever waits for the result
                self.failure = error
        self._rounds = None  # and what it keeps
        self.is_over.set()

    def finish(self) -> None:
        self.is_over.wait()
        if isinstance(self.failure, CollectiveError):
            raise CollectiveError(str(self.failure)) from self.failure
        if self.failure is not None:
            raise self.failure

    def is_past(self) -> bool:
        return self.is_over.is_set() and self.failure is None

    def wait_until_read(self) -> None:
        self.finish()


class Driver:
    """Runs what it is given, one after the other. Its thread is there from the first on, and ends with the driver.

    Args:
        name: of the thread.
        stops: after one that has failed, all others fail, too: other ranks expect what they do in that order.
    """

    _unfinished: ClassVar[set[Driven]] = set()

    def __init__(self, name: str = "zeroopt rounds", *, stops: bool = False) -> None:
        self._name, self._stops = name, stops
        self._waiting: SimpleQueue[Driven | None] = SimpleQueue()
        self._has_thread = False

    def start(self, driven: Driven) -> Driven:
        """Run it when those that were started before are over. Returns it."""
        self._unfinished.add(driven)
        self._waiting.put(driven)
        if not self._has_thread:
            arguments = self._waiting, self._unfinished, self._stops
            threading.Thread(target=_run_all, args=arguments, name=self._name, daemon=True).start()
            weakref.finalize(self, self._waiting.put, None)
            self._has_thread = True
        return driven


def _run_all(waiting: SimpleQueue[Driven | None], unfinished: set[Driven], stops: bool) -> None:
    failure: BaseException | None = None
    while (driven := waiting.get()) is not None:
        driven.run(failure)
        unfinished.discard(driven)
        if stops:
            failure = driven.failure
        del driven  # it keeps buckets


def wait_for_unfinished(deadline: float) -> None:
    """Wait until all that was ever started is over, but not for long.

    Args:
        deadline: by `time.monotonic()`.
    """
    for driven in list(Driver._unfinished):
        driven.is_over.wait(max(0.0, deadline - time.monotonic()))


@atexit.register
def _finish_at_exit() -> None:
    """The other ranks may still need what this one passes on. It comes before messages that nobody has waited for."""
    wait_for_unfinished(exit_deadline())
