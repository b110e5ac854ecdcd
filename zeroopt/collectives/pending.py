"""What has been started and has to be finished."""

from __future__ import annotations

import atexit
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from ..errors import CollectiveError
from .failure import describe_failure, is_timeout


class PendingCollective(ABC):
    """A collective that has been started."""

    @abstractmethod
    def finish(self) -> None:
        """Block until the result is there, or, on a device, let the current stream wait for it. Calling it again does nothing but for
        other streams.

        Raises:
            CollectiveError: a rank did not do its part: it died, gave up, or the group's timeout went by.
        """

    def is_past(self) -> bool:
        """After `finish`: whether no stream has to wait any more, as far as the host can tell at once."""
        return False

    def wait_until_read(self) -> None:
        """After `finish`: wait until this rank's input may be overwritten, for no other rank still reads it: as `finish` waits, the
        host, or on a device the current stream.

        Raises:
            CollectiveError: as `finish`.
        """


class Done(PendingCollective):
    """A collective that had nothing to wait for."""

    def finish(self) -> None:
        pass

    def is_past(self) -> bool:
        return True


class PendingWork(PendingCollective):
    """What torch.distributed has been told to do.

    Args:
        what: transport and collective, for messages.
        works: by the rank that it needs; None: by all.
        keep: tensors that it reads or writes.
        further_advice: what else there is to do where it fails.
    """

    # Gloo breaks the connection of a message that is freed before it has arrived, and with it the process group. So what
    # nobody finishes, because a model was dropped, stays here.
    _unfinished: ClassVar[set[PendingWork]] = set()

    def __init__(
        self,
        what: str,
        works: Sequence[tuple[int | None, dist.Work]],
        keep: Collection[object],
        further_advice: str = "",
    ) -> None:
        self._what = what
        self._further_advice = further_advice
        self._works = deque(works)
        self._keep = keep
        self._failure: str | None = None
        self._unfinished.add(self)

    def finish(self) -> None:
        if self._failure is not None:
            raise CollectiveError(self._failure)
        while self._works:
            rank, work = self._works[0]
            try:
                work.wait()
            except RuntimeError as error:
                # The backend's own message says whether it was a timeout or a lost connection.
                self._failure = self._give_up_rest(rank, str(error))
                raise CollectiveError(self._failure) from error
            self._works.popleft()
        self._unfinished.discard(self)
        self._keep = ()

    def wait_at_exit(self, deadline: float) -> None:
        """Wait for what is still on its way, unless it is in vain."""
        with suppress(RuntimeError):
            for _, work in self._works if self._failure is None else ():
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))

    def abandon(self) -> None:
        """Break the connections over which something has yet to come."""
        for _, work in self._works:
            with suppress(RuntimeError):
                work.wait(_AT_ONCE)

    def _give_up_rest(self, rank: int | None, reason: str) -> str:
        """Give up the messages that have not come by now. That breaks their connections, so that the ranks at the other ends
        fail at once too, rather than wait for this one."""
        missing = [rank]
        # Ranks that are slow to look would find this one gone, too: let them hear first of the one that failed.
        until = time.monotonic() + (0.0 if is_timeout(reason) else _GRACE_S)
        for other, work in list(self._works)[1:]:
            try:
                work.wait(max(_AT_ONCE, timedelta(seconds=until - time.monotonic())))
            except RuntimeError as error:
                # Who is merely not there yet is to blame only when the time has gone by for all.
                if is_timeout(reason) or not is_timeout(str(error)):
                    missing.append(other)
        return describe_failure(self._what, missing, reason, self._further_advice)


_AT_ONCE = timedelta(milliseconds=1)
_GRACE_S = 0.3
AT_EXIT = timedelta(seconds=10)


@atexit.register
def _finish_at_exit() -> None:
    """A rank that is through may be ahead of the others, who have yet to receive what it has sent."""
    deadline = time.monotonic() + AT_EXIT.total_seconds()
    for pending in list(PendingWork._unfinished):
        pending.wait_at_exit(deadline)


def start_message(
    message: Callable[[list[Tensor], int, int], dist.Work], tensor: Tensor, rank: int, tag: int
) -> dist.Work:
    """Start to send or to receive a tensor, by a method of a process group. It never raises: what fails at once, does so again
    when it is waited for."""
    try:
        return message([tensor], rank, tag)
    except RuntimeError as error:  # the connection has been broken before
        return _NotStarted(error)


class _NotStarted(dist.Work):
    """A message that fails when it is waited for, as others do: those started beside it must be kept until then."""

    def __init__(self, error: RuntimeError) -> None:
        super().__init__()
        self._error = error

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        raise self._error
