"""What `move` does, in torch's operations: for tensors on devices that have no kernels. The same bits, in more passes.

Arguments have been checked, as for kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def _tree_sum(slices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if len(slices) == 1:
        return slices[0].to(dtype)
    left = 1 << (len(slices) - 1).bit_length() - 1  # the largest power of two below their number
    return _tree_sum(slices[:left], dtype) + _tree_sum(slices[left:], dtype)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie, 1-D."""
    return tensor.as_strided((tensor.numel(),), (1,))
