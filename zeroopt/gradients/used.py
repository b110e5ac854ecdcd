"""Which parameters had a gradient on any rank: those without stay untouched by the step.

As under DistributedDataParallel with `find_unused_parameters`. One small collective a backward tells it, whether all ranks are at the
same place of the training loop, and whether on some rank backward passes run within this one, and whether it goes on with it.

On a device, the host hears of it when it has to: a rank that had all gradients itself knows that they are all used, and looks at
what the others have said one backward later, when it has long arrived. Where it has to know whether others go on, `hear` waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..collectives import PendingCollective, Transport
from ..collectives.failure import ADVICE
from ..errors import CollectiveError, StateError
from ..profiling import named_range
from ..streams import is_capturing
from ..transfers import Download, upload_into
from .lockstep import Lockstep

# What a rank says of its backward passes. The largest counts.
_RUNS_WITHIN, _GOES_ON = 1, 2


@dataclass
class _Round:
    """What one backward was agreed on by.

    Attributes:
        has_all: this rank had all gradients.
        goes_on: this rank goes on with that backward.
        agreed: what all have said, once it is there.
    """

    has_all: bool
    goes_on: bool
    agreed: Tensor
    pending: PendingCollective


class UsedParams:
    """What ranks agree on at the end of each backward.

    Attributes:
        flags: uint8 [number of parameters]: 1 where any rank had a gradient since it was cleared. Valid after `finish`.
        had_gradients: any rank, in the last backward. Valid after `finish`.
        has_run_within: some backward within another one, on some rank, as far as it has been heard of.
        others_go_on: with the last backward, and this rank does not. Valid after `hear`, on the CPU after `finish`.
        first_bucket: how messages call the model's first one.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lockstep = Lockstep(transport.control.rank, transport.control.size)
        self.flags = torch.zeros(0, dtype=torch.uint8, device="cpu")
        self.had_gradients = False
        self.has_run_within = False
        self.others_go_on = False
        self.first_bucket = ""
        self._said: Tensor | None = None
        self._last: _Round | None = None
        self._pending: list[_Round] = []
        self._unread: deque[tuple[_Round, Download]] = deque()  # in the order of the backward passes

    def extend(self, count: int, device: torch.device) -> None:
        """There are so many parameters more. Collective."""
        self.flags = torch.cat([self.flags, torch.zeros(count, dtype=torch.uint8, device="cpu")])
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
            if self._last is not None:
                self._last.pending.wait_until_read()
                self._last = None
            self._transport.free(self._said)
        self._said = self._transport.allocate(len(self.flags) + self._lockstep.num_bytes + 1, torch.uint8, device)

    def agree(self, came: bytearray, num_steps: int, *, runs_within: bool = False, goes_on: bool = False) -> None:
        """Start to tell, and to hear, which parameters had a gradient in a backward. Collective.

        Args:
            came: [number of parameters], 1 for those that had one on this rank.
            num_steps: that have been taken before it.
            runs_within: on this rank, others have run within that backward.
            goes_on: this rank calls it once more for the same backward, so all others have to.
        """
        if self._last is not None:
            self._last.pending.finish()
            self._last.pending.wait_until_read()  # other ranks read what is about to be written
        assert self._said is not None
        self.others_go_on = False
        passes = _GOES_ON if goes_on else _RUNS_WITHIN if runs_within else 0
        told = came + self._lockstep.note_backward(num_steps) + bytes([passes])
        said = torch.frombuffer(told, dtype=torch.uint8)
        if is_capturing(self._said.device):
            self._check_may_be_captured(came)
            self._said.fill_(1)  # the counts of now would be those of every replay
        else:
            upload_into(self._said, said)
        agreed = torch.empty_like(self._said)
        pending = self._transport.start_max(self._said, agreed, label="used parameters")
        self._last = _Round(all(came), goes_on, agreed, pending)
        self._pending.append(self._last)

    def finish(self) -> None:
        """Hear of all backward passes.

        Raises:
            CollectiveError: ranks have diverged, or another one did not do its part.
        """
        for each in self._pending:
            with named_range("wait_for_used"):
                each.pending.finish()
            if is_capturing(each.agreed.device):  # what a replay gives nobody reads
                self.had_gradients = True
                self.flags.fill_(1)
                continue
            self._unread.append((each, Download(each.agreed)))
            if each.has_all and not each.agreed.is_cpu:
                self._read_all_but(1)
                self.had_gradients = True
                self.flags.fill_(1)
            else:
                used = self._read_all_but(0)
                self.had_gradients = bool(used.any())
                self.flags |= used
        self._pending.clear()

    def hear(self) -> None:
        """As `finish`, and of the last backward too where it can be told without: whether others go on with it. Raises likewise."""
        self.finish()
        self._read_all_but(0)

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
            each, download = self._unread.popleft()
            agreed, num_bytes = download.read(), self._lockstep.num_bytes
            used, counts, passes = torch.split(agreed, [len(agreed) - num_bytes - 1, num_bytes, 1])
            self._check_lockstep(counts.tolist())
            self.has_run_within |= int(passes) >= _RUNS_WITHIN
            self.others_go_on = int(passes) == _GOES_ON and not each.goes_on
            if self.others_go_on and each is not self._last:
                raise self._diverged(
                    "another one went on with a backward, in which backward passes within it had used a parameter more often than here, "
                    "when this one had begun the next. Where ranks checkpoint activations with use_reentrant=True, let all of them do so"
                )
        return used

    def _check_lockstep(self, agreed: Sequence[int]) -> None:
        difference = self._lockstep.difference(agreed)
        if difference is not None:
            raise self._diverged(difference)

    def _diverged(self, difference: str) -> CollectiveError:
        self._transport.give_up("ranks have diverged")
        return CollectiveError(
            f"transport {self._transport.name}: the ranks have diverged: {difference}. So the gradients of "
            f"{self.first_bucket} and all that follow belong to different steps. {ADVICE}"
        )
