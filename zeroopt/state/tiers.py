"""State in the precision that it stands for: 8-bit moments decoded, and 16-bit parameters with what completes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..plan.params import ParamState
from .shard_tensor import ShardTensor


def is_coded(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether an entry has an array of that name as 8-bit codes."""
    value = entry.get(name)
    return (
        name in ops.MOMENTS
        and isinstance(value, Tensor)
        and not value.is_floating_point()
        and name + ops.SCALE_SUFFIX in entry
    )


def decode(codes: Tensor, scales: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
    """Elements [begin, end) of an array that is stored in 8 bits: float32, 1-D.

    Args:
        codes, scales: 1-D; see `ops.dequantize`.
    """
    end = codes.numel() if end is None else end
    first, last = begin // ops.QUANT_BLOCK, -(-end // ops.QUANT_BLOCK)
    part = codes[first * ops.QUANT_BLOCK : last * ops.QUANT_BLOCK].contiguous()
    values = torch.empty(part.numel(), dtype=torch.float32, device=part.device)
    ops.dequantize(part, scales[first:last].to(part.device).contiguous(), values)
    return values[begin - first * ops.QUANT_BLOCK : end - first * ops.QUANT_BLOCK]


def decoded(entry: Mapping[str, Any]) -> ParamState:
    """An entry without codes and scales; its arrays are those of one segment, in any shape without gaps, or `ShardTensor`s."""
    plain: ParamState = {}
    for name, value in entry.items():
        if is_coded(name, entry):
            plain[name] = _decode_like(value, entry[name + ops.SCALE_SUFFIX])
        elif name not in ops.SCALES or name.removesuffix(ops.SCALE_SUFFIX) not in entry:
            plain[name] = value
    return plain


def readable(entry: Mapping[str, Any]) -> ParamState:
    """An entry for state dicts, whose arrays whoever knows torch's names may take as they are: 8-bit moments decoded, and behind
    all else their scales, from which the very codes are found again."""
    return {**decoded(entry), **{name: value for name, value in entry.items() if name in ops.SCALES}}


def _decode_like(codes: Tensor, scales: Tensor) -> Tensor:
    scales = scales.local if isinstance(scales, ShardTensor) else scales
    if isinstance(codes, ShardTensor):
        return ShardTensor(codes.flat_layout, codes.start, decode(codes.local, scales))
    flat = codes.as_strided((codes.numel(),), (1,))
    return decode(flat, scales).as_strided(codes.shape, codes.stride())
