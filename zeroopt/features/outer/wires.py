"""In what form outer gradients and steps travel: as they are, in 16 bits, or as 8- or 4-bit codes. Sums are kept in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...collectives import Wire
from ...collectives.compression import CodedWire
from ...options.precision import CODE_BITS


class SummedHere(Wire):
    """Outer gradients are summed in float32, whatever they travel in, and whichever backend there is. A host's sum that goes on to
    other hosts is rounded to that once more: to send it as it is would take as many bytes as not to round at all."""

    backend_sums = False


class Coded(CodedWire):
    """Codes, rounded by other random numbers in each step and on each rank.

    Args:
        bits: of a code.
        now: tells the seed of this rank, and the number of the step.
        bucket: key of the bucket that travels.
    """

    def __init__(self, bits: int, now: Callable[[], tuple[int, int]], bucket: int) -> None:
        super().__init__(None, bits)
        self._now, self._bucket = now, bucket

    def encode(self, full: Tensor, num_slices: int) -> Tensor:
        seed, step = self._now()
        key = 2 * self._bucket + (num_slices == 1)  # a rank's own step is no outer gradient
        codes = self._codes_of(full, num_slices, seed=seed, step=step, key=key)
        return full.view(torch.uint8)[: codes.numel()].copy_(codes)


def outer_wire(
    outer_dtype: torch.dtype | str | None, now: Callable[[], tuple[int, int]], bucket: int
) -> SummedHere | Coded:
    """What `outer_dtype` asks for."""
    if isinstance(outer_dtype, str):
        return Coded(CODE_BITS[outer_dtype], now, bucket)
    return SummedHere(outer_dtype)
