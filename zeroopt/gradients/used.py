"""Which parameters had a gradient on any rank: those without stay untouched by the step.

As under DistributedDataParallel with `find_unused_parameters`. One small collective a backward tells it, and whether all ranks
are at the same place of the training loop.

On a device, the host hears of it when it has to: a rank that had all gradients itself knows that they are all used, and looks at
what the others have said one backward later, when it has long arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..collectives import PendingCollective, Transport
from ..collectives.failure import ADVICE
from ..errors import CollectiveError, StateError
from ..profiling import named_range
from ..streams import is_capturing
from ..transfers import Download, upload_into
from .lockstep import Lockstep


class UsedParams:
    """What ranks agree on at the end of each backward.

    Attributes:
        flags: uint8 [number of parameters]: 1 where any rank had a gradient since it was cleared. Valid after `finish`.
        had_gradients: any rank, in the last backward. Valid after `finish`.
        first_bucket: how messages call the model's first one.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lockstep = Lockstep(transport.control.rank, transport.control.size)
        self.flags = torch.zeros(0, dtype=torch.uint8)
        self.had_gradients = False
        self.first_bucket = ""
        self._said: Tensor | None = None
        self._before: PendingCollective | None = None
        self._pending: list[tuple[bool, Tensor, PendingCollective]] = []  # and whether this rank had all gradients
        self._unread: deque[Download] = deque()  # in the order of the backward passes

    def extend(self, count: int, device: torch.device) -> None:
        """There are so many parameters more. Collective."""
        self.flags = torch.cat([self.flags, torch.zeros(count, dtype=torch.uint8)])
        self._allocate(device)

    def forget(self, indices: Collection[int]) -> None:
        """These parameters have no gradient any more."""
        if len(indices) == len(self.flags):
            self.flags.zero_()
        elif indices:
            self.flags[list(indices)] = 0

    def keep(self, order: Sequence[int], device: torch.device) -> None:
        """Keep those parameters that had these indices, in this order. Collective."""
        self.flags = self.flags[list(order)]
        self._allocate(device)

    def _allocate(self, device: torch.device) -> None:
        if self._said is not None:
            if self._before is not None:
                self._before.wait_until_read()
                self._before = None
            self._transport.free(self._said)
        self._said = self._transport.allocate(len(self.flags) + self._lockstep.num_bytes, torch.uint8, device)

    def agree(self, came: bytearray, num_steps: int) -> None:
        """Start to tell, and to hear, which parameters had a gradient in a backward. Collective.

        Args:
            came: [number of parameters], 1 for those that had one on this rank.
            num_steps: that have been taken before it.
        """
        if self._before is not None:
            self._before.finish()
            self._before.wait_until_read()  # other ranks read what is about to be written
        assert self._said is not None
        said = torch.frombuffer(came + self._lockstep.note_backward(num_steps), dtype=torch.uint8)
        if is_capturing(self._said.device):
            self._check_may_be_captured(came)
            self._said.fill_(1)  # the counts of now would be those of every replay
        else:
            upload_into(self._said, said)
        agreed = torch.empty_like(self._said)
        self._before = self._transport.start_max(self._said, agreed, label="used parameters")
        self._pending.append((all(came), agreed, self._before))

    def finish(self) -> None:
        """Hear of all backward passes.

        Raises:
            CollectiveError: ranks have diverged, or another one did not do its part.
        """
        for has_all, agreed, pending in self._pending:
            with named_range("wait_for_used"):
                pending.finish()
            if is_capturing(agreed.device):  # what a replay gives nobody reads
                self.had_gradients = True
                self.flags.fill_(1)
                continue
            self._unread.append(Download(agreed))
            if has_all and not agreed.is_cpu:
                self._read_all_but(1)
                self.had_gradients = True
                self.flags.fill_(1)
            else:
                used = self._read_all_but(0)
                self.had_gradients = bool(used.any())
                self.flags |= used
        self._pending.clear()

    def _check_may_be_captured(self, came: bytearray) -> None:
        if not all(came):
            raise StateError(
                f"a CUDA graph cannot capture a step in which parameters have no gradient, here {came.count(0)} of {len(came)}: "
                "which of them the other ranks have used would have to be read from the device; let every parameter take part, or "
                "freeze those that do not"
            )

    def _read_all_but(self, count: int) -> Tensor:
        """Read what ranks have said, but for the last so many backward passes. Returns the flags of the last one that was read."""
        used = self.flags
        while len(self._unread) > count:
            agreed = self._unread.popleft().read()
            used = agreed[: -self._lockstep.num_bytes]
            self._check_lockstep(agreed[len(used) :].tolist())
        return used

    def _check_lockstep(self, agreed: Sequence[int]) -> None:
        difference = self._lockstep.difference(agreed)
        if difference is not None:
            self._transport.give_up("ranks have diverged")
            raise CollectiveError(
                f"transport {self._transport.name}: the ranks have diverged: {difference}. So the gradients of "
                f"{self.first_bucket} and all that follow belong to different steps. {ADVICE}"
            )
