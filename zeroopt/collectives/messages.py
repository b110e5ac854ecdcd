"""Messages that a backend has been told to send and to receive, until it is through with them.

Gloo breaks the connection of a message that is freed before it has arrived, and with it the process group. So nothing is freed before
somebody has waited for it: who has started it; or, where a model is dropped with something on its way, a thread; or the end of the
process.
"""

from __future__ import annotations

import _thread
import atexit
import os
import sys
import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from queue import SimpleQueue
from threading import Lock
from typing import ClassVar

import torch.distributed as dist

from .lost import break_off

_AT_EXIT_S = 10.0
_AT_ONCE = timedelta(milliseconds=1)
_LEAVING_S = 0.2


class Messages:
    """Some messages, and what they keep.

    Args:
        works: by the rank that each needs; None: by all.
        keep: tensors that they read or write, until all have come.
        group: in which they travel, if that is known.

    Attributes:
        is_over: nothing is on its way any more.
    """

    unfinished: ClassVar[set[Messages]] = set()

    def __init__(
        self,
        works: Sequence[tuple[int | None, dist.Work]],
        keep: Collection[object],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._works = deque(works)
        self._keep = keep
        self._group = group
        self._turn = (
            Lock()
        )  # of those that wait: a wait from which a signal has called away goes on, and there may be another
        self._failed: tuple[int | None, RuntimeError] | None = None
        self.is_over = False
        self.unfinished.add(self)

    def wait(self, timeout: timedelta | None = None) -> tuple[int | None, RuntimeError] | None:
        """Block until all have come, or one has failed. Returns that, by its rank and reason.

        Args:
            timeout: of each message; None: that with which Gloo connected the group, whatever has been set since. Collectives know theirs
                from when they were started.
        """
        with self._turn:
            while self._works and self._failed is None:
                rank, work = self._works[0]
                try:
                    work.wait() if timeout is None or rank is None else work.wait(timeout)
                except RuntimeError as error:
                    self._failed = rank, error
                self._works.popleft()
            if self._failed is None:
                self._let_go()
        return self._failed

    def give_up(self) -> list[tuple[int | None, str]]:
        """Break the connections of those that have not come. Returns which have failed now, by rank and reason."""
        # Not all works look at the time, and collectives go on though nobody waits for them.
        if self._works and self._group is not None:
            break_off(self._group)
        failed = []
        for rank, work in list(self._works):
            try:
                work.wait(_AT_ONCE)
            except RuntimeError as error:
                failed.append((rank, str(error)))
        self._let_go()
        return failed

    def end_by(self, deadline: float) -> None:
        """Wait for all until then, unless it is in vain, and give up the rest."""
        with suppress(RuntimeError):
            for _, work in list(self._works):
                if time.monotonic() >= deadline:
                    break
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            else:
                return
        self.give_up()
        # A thread that comes back from the backend when there is no interpreter any more would abort the process.
        if self._turn.acquire(timeout=_LEAVING_S):
            self._turn.release()

    def _let_go(self) -> None:
        self.is_over = True
        self._keep = ()
        self.unfinished.discard(self)


_left_behind: SimpleQueue[Messages] = SimpleQueue()
_served_by = 0  # the process whose thread takes them


def leave_behind(messages: Messages) -> None:
    """Have a thread wait for messages, then free them. The garbage collector may call this anywhere: it takes no locks."""
    global _served_by
    if sys.is_finalizing():
        return
    _left_behind.put(messages)
    if _served_by != os.getpid():  # a forked child has no thread
        _served_by = os.getpid()
        _thread.start_new_thread(_wait_for_all, ())


def _wait_for_all() -> None:
    while True:
        messages = _left_behind.get()
        if messages.wait() is not None:
            messages.give_up()
        del messages


def exit_deadline() -> float:
    """Until when a process that ends now waits for what is on its way, by `time.monotonic`.

    A rank that is through may be ahead of the others, who have yet to receive what it has sent. One that ends by an exception keeps
    nobody waiting: without it the others fail anyway.
    """
    has_failed = getattr(sys, "last_value", None) is not None
    return time.monotonic() + (0.0 if has_failed else _AT_EXIT_S)


@atexit.register
def _finish_at_exit() -> None:
    deadline = exit_deadline()
    for messages in list(Messages.unfinished):
        messages.end_by(deadline)
