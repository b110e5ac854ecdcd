"""A thread that goes on with what has been started when messages arrive, whatever the rank's own thread does meanwhile."""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Thread
from typing import ClassVar

from ..errors import CollectiveError

_AT_EXIT_S = 10.0


class Errand:
    """One thing that a courier does.

    Args:
        do: raises CollectiveError where other ranks do not do their part.
    """

    def __init__(self, do: Callable[[], None]) -> None:
        self._do: Callable[[], None] | None = do
        self._is_over = Event()
        self._failure: Exception | None = None

    def wait(self, seconds: float | None = None) -> None:
        """Block until it is done.

        Raises:
            CollectiveError: it has failed, or one before it.
        """
        if self._is_over.wait(seconds) and self._failure is not None:
            raise CollectiveError(str(self._failure)) from self._failure

    def run(self, failure: Exception | None) -> Exception | None:
        """Do it, unless one before it has failed. Returns what has."""
        if failure is None:
            try:
                assert self._do is not None
                self._do()
            except Exception as error:  # noqa: BLE001  whoever waits for it hears of it
                failure = error
        self._do = None  # it holds what was moved
        self._failure = failure
        self._is_over.set()
        return failure


class Courier:
    """Does errands one after the other, in the order in which they are handed over. After one that has failed, all others fail, too: other
    ranks expect them in that order.

    Its thread begins with the first errand and ends with the courier.
    """

    _unfinished: ClassVar[set[Errand]] = set()

    def __init__(self, name: str) -> None:
        self._name = name
        self._errands: SimpleQueue[Errand | None] = SimpleQueue()
        self._has_thread = False

    def hand_over(self, do: Callable[[], None]) -> Errand:
        """Have something done."""
        errand = Errand(do)
        self._unfinished.add(errand)
        self._errands.put(errand)
        if not self._has_thread:
            Thread(target=_serve, args=(self._errands, self._unfinished), name=self._name, daemon=True).start()
            weakref.finalize(self, self._errands.put, None)
            self._has_thread = True
        return errand


def _serve(errands: SimpleQueue[Errand | None], unfinished: set[Errand]) -> None:
    failure: Exception | None = None
    while (errand := errands.get()) is not None:
        failure = errand.run(failure)
        unfinished.discard(errand)
        del errand


@atexit.register
def _finish_at_exit() -> None:
    """A rank that is through may be ahead of the others of its host, who depend on what it receives."""
    deadline = time.monotonic() + _AT_EXIT_S
    for errand in list(Courier._unfinished):
        try:
            errand.wait(max(0.001, deadline - time.monotonic()))
        except CollectiveError:
            return
