"""What the functions of this package check of their arguments, in one wording."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import ConfigError, NotSupportedError

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Columns of a row of segments, struct SegmentRow in csrc/kernels.h.
NUMEL_COLUMN, GROUP_COLUMN, PARAM_COLUMN, GRAD_COLUMN, STATE_COLUMN = 0, 1, 4, 6, 7
ROW_COLUMNS = 13


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def dtype_code(name: str, tensor: Tensor) -> int:
    found = DTYPE_CODES.get(tensor.dtype)
    if found is None:
        raise ConfigError(f"expected {name} to be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if tensor.is_meta:
        raise NotSupportedError(f"there are kernels for CPU and CUDA tensors, {name} is on {tensor.device}")
    check_not_negated(name, tensor)
    return found


def check_not_negated(name: str, tensor: Tensor) -> None:
    """Raise ConfigError for a view whose elements are those of the memory with the other sign, as of an imaginary part."""
    if tensor.is_neg():
        raise ConfigError(
            f"expected {name} to be what is in its memory, got a negated view of that; call .resolve_neg()"
        )


def check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ConfigError(f"expected {name} to be on {other.device}, got {tensor.device}")


def check_flat(name: str, tensor: Tensor, numel: int) -> None:
    if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() != numel:
        raise ConfigError(
            f"expected {name} to be 1-D and contiguous with {numel} elements, got shape {list(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )
    check_not_negated(name, tensor)


def check_disjoint(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    other_start, other_end = other.data_ptr(), other.data_ptr() + other.numel() * other.element_size()
    if start < other_end and other_start < end:
        raise ConfigError(f"expected {name} and {other_name} not to overlap in memory; clone one of them")


def lies_as(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether the elements of a tensor lie in memory as those of one of its shape with these strides do. Where a dimension has one
    element its stride says nothing, and on devices gradients of 1 x 1 convolutions may have others there than their weights."""
    return tensor.stride() == strides or all(
        size == 1 or one == other for size, one, other in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory, each its own place, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def check_none_overlap(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ConfigError when two of many dense tensors share memory."""
    ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name) for name, tensor in tensors)
    for (_, end, name), (start, _, next_name) in pairwise(ranges):
        if end > start:
            raise ConfigError(f"expected {name} and {next_name} not to overlap in memory")


def check_table(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], other: Tensor) -> None:
    if tensor.dtype is not dtype:
        raise ConfigError(f"expected {name} to be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ConfigError(f"expected {name} to be contiguous of shape {list(shape)}, got {list(tensor.shape)}")
    check_device(name, tensor, other)


def current_stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
