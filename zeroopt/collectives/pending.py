"""What has been started and has to be finished."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CollectiveError
from .failure import describe_failure, is_timeout
from .group_timeout import group_timeout
from .lost import has_gloo, name_lost
from .messages import Messages, leave_behind
from .patience import wait_patiently

_CPU = torch.device("cpu")


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

    Where it is dropped before it is finished, as with a model, another thread waits for it.

    Args:
        what: transport and collective, for messages.
        works: by the rank that it needs; None: by all.
        keep: tensors that it reads or writes.
        further_advice: what else there is to do where it fails.
        group: whose ranks these are, for what more can be found out where it fails.
        on_device: of tensors on a device, for which the current stream of the thread waits that finishes it.
    """

    def __init__(
        self,
        what: str,
        works: Sequence[tuple[int | None, dist.Work]],
        keep: Collection[object],
        further_advice: str = "",
        group: dist.ProcessGroup | None = None,
        *,
        on_device: bool = False,
    ) -> None:
        self._what = what
        self._further_advice = further_advice
        self._group = group
        self._on_device = on_device
        self._messages = Messages(works, keep, group)
        self._failure: str | None = None

    def finish(self) -> None:
        if self._failure is not None:
            raise CollectiveError(self._failure)
        if self._messages.is_over:
            return
        failed = self._messages.wait() if self._on_device else wait_patiently(self._wait_on_host)
        if failed is not None:
            rank, error = failed
            # The backend's own message says whether it was a timeout or a lost connection.
            self._failure = self._give_up_rest(rank, str(error))
            raise CollectiveError(self._failure) from error

    def _wait_on_host(self) -> tuple[int | None, RuntimeError] | None:
        if self._group is None or not has_gloo(self._group):
            return self._messages.wait()
        return self._messages.wait(group_timeout(self._group, _CPU))

    def abandon(self) -> None:
        """Break the connections over which something has yet to come."""
        self._messages.give_up()

    def _give_up_rest(self, rank: int | None, reason: str) -> str:
        """Give up the messages that have not come by now. That breaks their connections, so that the ranks at the other ends
        fail at once too, rather than wait for this one."""
        missing = [rank]
        # Before others find this one gone, too, they are told. After a timeout there are no connections any more.
        if not is_timeout(reason):
            name_lost(self._group, missing, reason)
        for other, why in self._messages.give_up():
            # Who is merely not there yet is to blame only when the time has gone by for all.
            if is_timeout(reason) or not is_timeout(why):
                missing.append(other)
        return describe_failure(self._what, name_lost(self._group, missing, reason), reason, self._further_advice)

    def __del__(self) -> None:
        if not self._messages.is_over:
            leave_behind(self._messages)


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
