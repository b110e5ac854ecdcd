"""What codes have left out of the gradients that a rank has sent, to be sent later: error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

from ..pages import paged_zeros


class Residual:
    """Of one bucket: as large as what this rank sends of it, and in bfloat16, for what is left out is less than a step of a code, of
    which eight digits are enough.

    It lies as buckets travel, stripe by stripe, and has memory from its first use on.

    Args:
        first: the element of the bucket that it begins with.
        num_slices: of the bucket, that this rank sends.
        lengths: of the stripes in which the bucket travels, in elements of a slice.

    Attributes:
        numel: elements of the bucket.
    """

    def __init__(self, first: int, num_slices: int, lengths: Sequence[int], device: torch.device) -> None:
        self.first = first
        self.numel: int = num_slices * sum(lengths)
        self._num_slices, self._lengths, self._device = num_slices, list(lengths), device
        self._parts: list[Tensor] = []
        self._turns = cycle(range(len(lengths)))

    @property
    def nbytes(self) -> int:
        """That it takes once it is used."""
        return self.numel * torch.bfloat16.itemsize

    @property
    def is_used(self) -> bool:
        """Whether there is something in it."""
        return bool(self._parts)

    def next(self) -> tuple[int, Tensor]:
        """The number of the stripe which travels next, and its part, 1-D."""
        if not self._parts:
            self._allocate()
        stripe = next(self._turns)
        return stripe, self._parts[stripe]

    def read(self) -> Tensor:
        """[numel], a copy in the order of the bucket's elements."""
        if not self._parts:
            return torch.zeros(self.numel, dtype=torch.bfloat16, device=self._device)
        return torch.cat([part.view(self._num_slices, -1) for part in self._parts], dim=1).view(-1)

    def write(self, values: Tensor) -> None:
        """Replace it.

        Args:
            values: as `read` gives them.
        """
        if not self._parts:
            self._allocate()
        pieces = torch.split(values.view(self._num_slices, -1), self._lengths, dim=1)
        for part, piece in zip(self._parts, pieces, strict=True):
            part.view(self._num_slices, -1).copy_(piece)

    def clear(self, first: int, last: int) -> None:
        """Forget elements [first, last) of the bucket."""
        begin, end = max(first - self.first, 0), min(last - self.first, self.numel)
        if self._parts and begin < end:
            values = self.read()
            values[begin:end] = 0
            self.write(values)

    def drop(self) -> None:
        """Forget all of it."""
        for part in self._parts:
            part.zero_()

    def _allocate(self) -> None:
        memory = paged_zeros(self.numel, torch.bfloat16, self._device)
        self._parts = list(torch.split(memory, [self._num_slices * length for length in self._lengths]))
