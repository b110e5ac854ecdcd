"""What `move` and `exact_sum` do, in torch's operations: for tensors on devices that have no kernels. The same bits, in more passes.

Arguments have been checked, as for kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements in float64 at a time: what stays in a processor's cache, and what is no great part of a device's memory.
_CACHED_NUMEL = 1 << 14
_CHUNK_NUMEL = 1 << 24


@torch.no_grad()
def pack(src: Tensor, dst: Tensor, scale: float) -> None:
    """``dst = src * scale``, element by element in storage order."""
    source, target = _in_memory_order(src), _in_memory_order(dst)
    wide = torch.float64 if torch.float64 in (src.dtype, dst.dtype) else torch.float32
    target.copy_(source if scale == 1.0 else source.to(wide) * scale)


@torch.no_grad()
def reduce(slices: Sequence[Tensor], out: Tensor, base: Tensor | None) -> None:
    """``out = base + (slices[0] + slices[1] + ...)``, as the tree that `move.reduce` describes."""
    wide = torch.float64 if out.dtype is torch.float64 else torch.float32
    total = _tree_sum(slices, wide)
    out.copy_(total if base is None else base.to(wide) + total)


@torch.no_grad()
def sum_in_parts(values: Tensor, scale: Tensor, rounders: Sequence[float], *, squared: bool) -> Tensor:
    """The sums of the parts of terms, as `exact_sum.sum_in_parts` describes them."""
    sums = torch.zeros(len(rounders), dtype=torch.float64, device=values.device)
    for chunk in torch.split(values, _CACHED_NUMEL if values.is_cpu else _CHUNK_NUMEL):
        rest = chunk.double() * scale
        rest = rest.square_() if squared else rest.abs_()
        for number, rounder in enumerate(rounders):
            part = (rest + rounder).sub_(rounder)
            sums[number] += part.sum()
            rest -= part
    return sums


def _tree_sum(slices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if len(slices) == 1:
        return slices[0].to(dtype)
    left = 1 << (len(slices) - 1).bit_length() - 1  # the largest power of two below their number
    return _tree_sum(slices[:left], dtype) + _tree_sum(slices[left:], dtype)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie, 1-D."""
    return tensor.as_strided((tensor.numel(),), (1,))
