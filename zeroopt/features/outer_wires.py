"""In what form outer gradients and steps travel: as they are, in 16 bits, or as 8- or 4-bit codes. Sums are kept in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..collectives import Wire
from ..options.precision import CODE_BITS


class SummedHere(Wire):
    """Outer gradients are summed in float32, whatever they travel in, and whichever backend there is."""

    backend_sums = False


class Coded(Wire):
    """Codes with a step for every 256 elements, rounded stochastically, by other random numbers in each step and on each rank.

    Args:
        bits: of a code.
        now: tells the seed of this rank, and the number of the step.
        bucket: index of the bucket that travels.
    """

    backend_sums = False
    nests = False

    def __init__(self, bits: int, now: Callable[[], tuple[int, int]], bucket: int) -> None:
        super().__init__()
        self._bits, self._now, self._bucket = bits, now, bucket

    def encode(self, full: Tensor, num_slices: int) -> Tensor:
        seed, step = self._now()
        num_bytes = num_slices * ops.encoded_bytes(full.numel() // num_slices, self._bits)
        codes = torch.empty(num_bytes, dtype=torch.uint8, device=full.device)
        ops.encode_slices(
            full,
            codes,
            num_slices=num_slices,
            bits=self._bits,
            seed=seed,
            step=step % 2**32,
            key=2 * self._bucket + (num_slices == 1),  # a rank's own step is no outer gradient
        )
        return full.view(torch.uint8)[:num_bytes].copy_(codes)

    def combine(self, slices: Sequence[Tensor], out: Tensor, base: Tensor | None) -> None:
        ops.sum_encoded(slices, out, bits=self._bits, base=base)


def outer_wire(
    outer_dtype: torch.dtype | str | None, now: Callable[[], tuple[int, int]], bucket: int
) -> SummedHere | Coded:
    """What `outer_dtype` asks for."""
    if isinstance(outer_dtype, str):
        return Coded(CODE_BITS[outer_dtype], now, bucket)
    return SummedHere(outer_dtype)
