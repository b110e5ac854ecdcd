"""Memory in which buckets travel between the ranks that average."""

from __future__ import annotations

import torch
from torch import Tensor

from ...collectives import Transport


class ExchangeBuffers:
    """Lends buffers that a transport works on; keeps as many as were ever on the way at once.

    All ranks take and give back the same in the same order, so that they use the same buffers.

    Attributes:
        most: bytes of the largest buffer that will be asked for.
    """

    def __init__(self, transport: Transport, device: torch.device) -> None:
        self._transport, self._device = transport, device
        self._free: list[Tensor] = []
        self.most = 0

    def take(self, num_bytes: int) -> Tensor:
        """A uint8 buffer of at least so many bytes. Collective where it has to be made."""
        assert num_bytes <= self.most
        while self._free:
            buffer = self._free.pop()
            if buffer.numel() >= num_bytes:
                return buffer
            self._transport.free(buffer)
        return self._transport.allocate(self.most, torch.uint8, self._device)

    def give_back(self, buffer: Tensor) -> None:
        """That was taken, and that no collective uses any more."""
        self._free.append(buffer)
