"""Which parameters of a bucket had a gradient on any rank, told while the bucket travels.

Ranks tell it for all parameters when backward is through (`gradients.used`), which is too late for a bucket that is stepped before.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ..collectives import PendingCollective, Transport
from ..collectives.pending import Done
from ..transfers import upload_into


class UsedInBucket:
    """One small collective beside the reduce of each bucket. One bucket is on its way at a time.

    What a rank has said of one bucket may be read by others until they have the sum of that bucket, so the next one takes the
    other of two buffers.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._room = 0
        self._turns: deque[tuple[Tensor, PendingCollective]] = deque()
        self._pending: PendingCollective = Done()
        self._heard = torch.zeros(0, dtype=torch.uint8, device="cpu")
        self._has_all = False

    def fit(self, count: int, device: torch.device) -> None:
        """Make room for buckets of so many parameters. Nothing may be on its way. Collective."""
        if count <= self._room:
            return
        for said, before in self._turns:
            before.wait_until_read()
            self._transport.free(said)
        self._room = count
        self._turns = deque((self._transport.allocate(count, torch.uint8, device), Done()) for _ in range(2))

    def tell(self, used: bytearray, label: str) -> None:
        """Start to tell which parameters of a bucket have a gradient on this rank. Collective.

        Args:
            used: [number of parameters in the bucket], 1 for those that have.
        """
        buffer, before = self._turns.popleft()
        before.wait_until_read()
        said = buffer[: len(used)]
        upload_into(said, torch.frombuffer(used, dtype=torch.uint8))
        self._heard = torch.empty_like(said)
        self._has_all = all(used)
        self._pending = self._transport.start_max(said, self._heard, label=f"used parameters of {label}")
        self._turns.append((buffer, self._pending))

    def hear(self) -> list[int]:
        """1 for each parameter of that bucket that has a gradient on any rank."""
        self._pending.finish()
        if self._has_all:  # then others add nothing, and the host need not wait for a device
            return [1] * len(self._heard)
        return list(self._heard.tolist())
