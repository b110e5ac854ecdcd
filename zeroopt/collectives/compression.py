"""Gradients as 8- or 4-bit codes on their way over a network, with error feedback: `gradient_compression`.

Every rank encodes what it sends: its own gradients, or, where ranks of a host sum theirs in shared memory first, the host's sum of
its part. Whoever owns a slice decodes those of all ranks and sums them in float32, in the order of ranks.

    gradient + residual ──▶ codes ──▶ network ──▶ decoded, summed
           ▲                  │
           └── what codes ◀───┘
               leave out
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .residual import Residual
from .wire import Wire


@dataclass(frozen=True)
class Noise:
    """By which one rank rounds one bucket.

    Attributes:
        seed: of this rank.
        key: of the bucket.
        rounds: the numbers of what is encoded, one after the other, for all buckets of the rank.
    """

    seed: int
    key: int
    rounds: Iterator[int]


class CompressedWire(Wire):
    """Moves the gradients of one bucket as codes.

    Args:
        dtype: of the bucket while it is filled.
        bits: of a code, 8 or 4.
        residual: of what this rank sends.
    """

    backend_sums = False
    nests = False
    residual: Residual

    def __init__(self, dtype: torch.dtype | None, bits: int, residual: Residual, noise: Noise) -> None:
        super().__init__(dtype)
        self.residual = residual
        self._bits, self._noise = bits, noise

    def encode(self, full: Tensor, num_slices: int) -> Tensor:
        num_bytes = num_slices * ops.encoded_bytes(full.numel() // num_slices, self._bits)
        # Not in place: blocks are encoded side by side, in whatever order.
        encoded = torch.empty(num_bytes, dtype=torch.uint8, device=full.device)
        ops.encode_slices(
            full,
            encoded,
            num_slices=num_slices,
            bits=self._bits,
            seed=self._noise.seed,
            step=next(self._noise.rounds) % 2**32,
            key=self._noise.key,
            residual=self.residual.next(),
        )
        return encoded

    def combine(self, slices: Sequence[Tensor], out: Tensor, base: Tensor | None) -> None:
        ops.sum_encoded(slices, out, bits=self._bits, base=base)


class HostSumsWire(Wire):
    """Moves gradients within a host as they are, and the host's sums to other hosts by another wire.

    Args:
        between_hosts: that one.
    """

    def __init__(self, between_hosts: CompressedWire) -> None:
        super().__init__(between_hosts.dtype)
        self.between_hosts = between_hosts
        self.residual = between_hosts.residual
