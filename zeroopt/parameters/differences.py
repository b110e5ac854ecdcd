"""Updated parameters on their way as differences in codes, which every rank decodes alike.

    owner        exact values less what the model has ──▶ codes ──┐
    every rank   what the model has plus what codes say  ◀────────┴── all-gather

So the model has the same bits on all ranks, the owner among them, who alone has the exact values (`storage.masters.AheadOfModel`).
What codes leave out is in the next difference: error feedback (Karimireddy et al., 2019, arXiv:1901.09847) without memory of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .. import ops
from ..collectives import PendingCollective, Transport
from ..collectives.rounding import RoundingNumbers
from ..options.precision import CODE_BITS
from ..storage.bucket import Bucket
from ..storage.masters import AheadOfModel
from ..streams import Mark


@dataclass
class _Codes:
    """Of one bucket.

    Attributes:
        encoded: uint8, [num_slices * bytes of a slice], where the transport can work on it; always the same memory.
        key: of their random numbers.
    """

    encoded: Tensor
    bits: int
    key: int


class Differences:
    """Those of one wrapped model.

    Args:
        rounding: the same on all ranks.
    """

    def __init__(self, transport: Transport, rounding: RoundingNumbers | None) -> None:
        self._transport = transport
        self._rounding = rounding
        self._codes: dict[int, _Codes] = {}

    def forget(self) -> None:
        """Other buckets come, or none. Nothing is on its way."""
        for codes in self._codes.values():
            self._transport.free(codes.encoded)
        self._codes.clear()

    def start(self, bucket: Bucket) -> PendingCollective:
        """Let what has changed in this rank's slice travel. Collective, as `Transport.start_all_gather`.

        The one before has arrived. When this one has, the model has the new parameters.
        """
        codes, rounding = self._codes_of(bucket), self._rounding
        assert rounding is not None
        num_slices, own = self._transport.num_slices, self._transport.slice_index
        ops.encode_slices(
            cast(AheadOfModel, bucket.master).difference,
            self._transport.own_slice(codes.encoded),
            num_slices=1,
            bits=codes.bits,
            seed=(rounding.seed + own) % 2**64,
            step=rounding.step,
            key=codes.key,
        )
        gather = self._transport.start_all_gather(codes.encoded, label=bucket.name)
        return _Difference(gather, codes, bucket.flat_param, num_slices)

    def _codes_of(self, bucket: Bucket) -> _Codes:
        if bucket.index not in self._codes:
            bits = code_bits(bucket)
            num_bytes = encoded_bytes(bucket, self._transport.num_slices)
            encoded = self._transport.allocate(num_bytes, torch.uint8, bucket.device)
            self._codes[bucket.index] = _Codes(encoded, bits, bucket.key)
        return self._codes[bucket.index]


class _Difference(PendingCollective):
    """A gather of codes, and what becomes of them."""

    def __init__(self, gather: PendingCollective, codes: _Codes, flat_param: Tensor, num_slices: int) -> None:
        self._gather = gather
        self._codes = codes
        self._flat_param = flat_param
        self._num_slices = num_slices
        self._decoded: Mark | None = None

    def finish(self) -> None:
        if self._decoded is None:
            self._gather.finish()
            slices = self._flat_param.view(self._num_slices, -1).unbind()
            for encoded, values in zip(self._codes.encoded.view(self._num_slices, -1).unbind(), slices, strict=True):
                ops.sum_encoded([encoded], values, bits=self._codes.bits, base=values)
            self._decoded = Mark(self._flat_param.device)
        self._decoded.wait()

    def is_past(self) -> bool:
        return self._decoded is not None and self._decoded.is_past()


def code_bits(bucket: Bucket) -> int:
    """Of the codes of a bucket whose differences travel."""
    assert bucket.precision.parameter_compression is not None
    return CODE_BITS[bucket.precision.parameter_compression]


def encoded_bytes(bucket: Bucket, num_slices: int) -> int:
    """Of the codes of all slices of a bucket."""
    return num_slices * ops.encoded_bytes(bucket.padded_numel // num_slices, code_bits(bucket))
