"""Memory for sums of slices on their way to the ranks that step them, where whole parameters lie across slices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives.pairwise import StagingPool


class SliceSums:
    """Those of one model. On the CPU memory is used again, and stays: as much as was ever in use at once. A device's allocator does that
    itself."""

    def __init__(self) -> None:
        self._pool = StagingPool()
        self._lent: dict[int, Tensor] = {}  # by the address of the memory, which a piece of no elements has, too
        self._most = self._now = 0

    @property
    def nbytes(self) -> int:
        """The most that has been in use at once."""
        return self._most

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[numel], with whatever there is in it, until it is given back."""
        num_bytes = numel * dtype.itemsize
        if device.type != "cpu":
            return torch.empty(numel, dtype=dtype, device=device)
        memory = self._pool.take(max(1, num_bytes))
        self._lent[memory.untyped_storage().data_ptr()] = memory
        self._now += memory.nbytes
        self._most = max(self._most, self._now)
        return memory[:num_bytes].view(dtype)

    def give_back(self, taken: Tensor) -> None:
        """Nobody reads or writes it any more."""
        if taken.is_cpu:
            memory = self._lent.pop(taken.untyped_storage().data_ptr())
            self._now -= memory.nbytes
            self._pool.give_back(memory)
