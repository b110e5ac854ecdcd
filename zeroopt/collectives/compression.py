"""Gradients as 8- or 4-bit codes on their way over a network, with error feedback: `gradient_compression`.

Every rank encodes what it sends: its own gradients, or, where ranks of a host sum theirs in shared memory first, the host's sum of
its part. Whoever owns a slice decodes those of all ranks and sums them in float32, in the order of ranks.

    gradient + residual ──▶ codes ──▶ network ──▶ decoded, summed
           ▲                  │
           └── what codes ◀───┘
               leave out
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from .residual import Residual
from .rounding import Noise
from .wire import Wire


class CodedWire(Wire):
    """Moves codes with a step for every 256 elements, rounded stochastically. Subclasses say by which random numbers.

    Args:
        dtype: of the bucket while it is filled.
        bits: of a code, 8 or 4.
    """

    backend_sums = False
    nests = False

    def __init__(self, dtype: torch.dtype | None, bits: int) -> None:
        super().__init__(dtype)
        self._bits = bits

    def _codes_of(
        self, full: Tensor, num_slices: int, *, seed: int, step: int, key: int, residual: Tensor | None = None
    ) -> Tensor:
        """In memory of their own; `seed`, `key` and `residual` as for `ops.encode_slices`, `step` may be any number of a count."""
        num_bytes = num_slices * ops.encoded_bytes(full.numel() // num_slices, self._bits)
        # Not in place: blocks are encoded side by side, in whatever order.
        encoded = torch.empty(num_bytes, dtype=torch.uint8, device=full.device)
        ops.encode_slices(
            full,
            encoded,
            num_slices=num_slices,
            bits=self._bits,
            seed=seed,
            step=step % 2**32,
            key=key,
            residual=residual,
        )
        return encoded

    def combine(self, slices: Sequence[Tensor], out: Tensor, base: Tensor | None) -> None:
        ops.sum_encoded(slices, out, bits=self._bits, base=base)


class CompressedWire(CodedWire):
    """Moves the gradients of one bucket as codes.

    Args:
        dtype, bits: as for `CodedWire`.
        residual: of what this rank sends.
    """

    residual: Residual

    def __init__(self, dtype: torch.dtype | None, bits: int, residual: Residual, noise: Noise) -> None:
        super().__init__(dtype, bits)
        self.residual = residual
        self._noise = noise

    def encode(self, full: Tensor, num_slices: int) -> Tensor:
        noise = self._noise
        stripe, residual = self.residual.next()
        return self._codes_of(
            full,
            num_slices,
            seed=noise.seed,
            step=noise.numbers.backward,
            key=noise.key_of(stripe),
            residual=residual,
        )


class HostSumsWire(Wire):
    """Moves gradients within a host as they are, and the host's sums to other hosts by another wire.

    Args:
        between_hosts: that one.
    """

    def __init__(self, between_hosts: CompressedWire) -> None:
        super().__init__(between_hosts.dtype)
        self.between_hosts = between_hosts
        self.residual = between_hosts.residual
