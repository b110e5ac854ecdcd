"""What codes have left out of gradients, by parameter: to move it into other buckets, and to save it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ..plan.params import ManagedParam
from ..storage.bucket import Bucket
from ..storage.gradient_store import GradientStore


class LeftOut(NamedTuple):
    """Of one parameter, as far as this rank sends it.

    Attributes:
        start: the first of the parameter's elements.
        values: bfloat16, 1-D.
    """

    start: int
    values: Tensor


Residuals = Mapping[ManagedParam, LeftOut]


def collect_residuals(stores: Sequence[GradientStore], buckets: Sequence[Bucket]) -> dict[ManagedParam, LeftOut]:
    """What this rank holds, in memory of its own. Not collective."""
    found = {}
    for bucket, store in zip(buckets, stores, strict=True):
        residual = store.residual
        if residual is None or not residual.is_used:
            continue
        values = residual.read()
        for managed in bucket.params:
            begin = bucket.offset_of(managed)
            first, last = max(begin, residual.first), min(begin + managed.numel, residual.first + residual.numel)
            if first < last:
                found[managed] = LeftOut(first - begin, values[first - residual.first : last - residual.first])
    return found


def hand_out_residuals(residuals: Residuals, stores: Sequence[GradientStore], buckets: Sequence[Bucket]) -> None:
    """Let it go on in these buckets. What lies where another rank sends now is dropped. Not collective."""
    if not residuals:
        return
    for bucket, store in zip(buckets, stores, strict=True):
        residual = store.residual
        if residual is None:
            continue
        values = residual.read().zero_()
        for managed in (one for one in bucket.params if one in residuals):
            left = residuals[managed]
            begin = bucket.offset_of(managed) + left.start - residual.first
            first, last = max(begin, 0), min(begin + left.values.numel(), residual.numel)
            if first < last:
                values[first:last].copy_(left.values[first - begin : last - begin])
        residual.write(values)
