"""Memory for what collectives receive, of which there is one piece for all that run one after the other on a stream.

Before torch 2.8 NCCL told the allocator of its own stream (`record_stream`): memory that was dropped came back no sooner than the
device was through with it, as the allocator happened to see later. A host that is ahead of its device would take new memory for
every bucket.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..streams import capture_number
from .comm_stream import CommStream


class Scratch:
    """Belongs to a communication stream, on which whoever takes it comes behind those that have had it before.

    Where the host has to wait for collectives, several may be on their way before any result has been used: each has memory of its
    own then.
    """

    def __init__(self, stream: CommStream) -> None:
        self._stream = stream
        self._most_bytes = 0
        self._memory: Tensor | None = None
        self._capture = 0

    def take(self, numel: int, like: Tensor) -> Tensor:
        """[numel], with whatever there is in it, to be used on the communication stream, until another one is taken.

        Args:
            like: of whose dtype and device it is.
        """
        num_bytes = numel * like.itemsize
        self._most_bytes = max(self._most_bytes, num_bytes)
        if self._stream.blocks_host:
            return self._allocate(num_bytes, like).view(like.dtype)
        capture = capture_number(self._stream.device)
        if self._memory is None or self._memory.numel() < num_bytes or self._capture != capture:
            self._memory = self._allocate(self._most_bytes, like)
            self._capture = capture  # a CUDA graph has memory of its own, which nobody else may write
        return self._memory[:num_bytes].view(like.dtype)

    def drop(self) -> None:
        """Nothing is taken for a while; what is on its way has what it needs."""
        self._memory = None

    def _allocate(self, num_bytes: int, like: Tensor) -> Tensor:
        with self._stream.entered():
            return torch.empty(num_bytes, dtype=torch.uint8, device=like.device)
