"""Memory in pages of its own, which go back to the system when it is dropped, whatever else the process allocates.

What the C allocator hands out in between lies in its heap, and leaves holes there when it is freed: they belong to the process
for as long as anything behind them is in use. So what a training keeps for long does not come from there.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PAGESIZE, PROT_READ, PROT_WRITE, mmap

import torch
from torch import Tensor

_WORTH_A_PAGE = 16 * PAGESIZE  # bytes: below, what the last page leaves unused is more than a heap would lose
_MAP_FIXED = 0x10
_MADV_DONTNEED, _MADV_REMOVE = 4, 9  # for memory of this process and for memory that processes share


def paged_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, 1-D. On the CPU, in pages of their own (but for little ones), which take memory only when they are first written."""
    num_bytes = numel * dtype.itemsize
    if device.type != "cpu" or num_bytes < _WORTH_A_PAGE:
        return torch.zeros(numel, dtype=dtype, device=device)
    return torch.frombuffer(mmap(-1, num_bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS), dtype=dtype)


def paged_zeros_like(own: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Likewise, as many as another 1-D tensor has elements."""
    return paged_zeros(own.numel(), dtype or own.dtype, own.device if device is None else device)


def folded(numel: int, period: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for values that nobody needs, 1-D, that takes no more than `period` elements: what is written to one of them is written
    to all that are a multiple of the period away from it. On Linux, on the CPU and where there are several periods; else zeros.

        period     ├────┼────┼────┼──┤        numel
        memory     │    │◀───┘◀───┘◀─┘

    Args:
        period: its bytes are a multiple of a page's.
    """
    num_bytes, fold_bytes = numel * dtype.itemsize, period * dtype.itemsize
    assert fold_bytes % PAGESIZE == 0
    made = paged_zeros(numel, dtype, device)
    if device.type != "cpu" or num_bytes <= fold_bytes or sys.platform != "linux":
        return made
    arguments = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    map_at = _c_function("mmap", *arguments)
    descriptor = os.memfd_create("zeroopt", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, fold_bytes)
        for begin in range(0, num_bytes, fold_bytes):  # in the place of the pages that are there
            size = min(fold_bytes, num_bytes - begin)
            how = PROT_READ | PROT_WRITE, MAP_SHARED | _MAP_FIXED
            if map_at is None or map_at(made.data_ptr() + begin, size, *how, descriptor, 0) == -1:
                break  # what is not folded is memory as any other
    finally:
        os.close(descriptor)
    return made


def move_to_pages(tensor: Tensor) -> None:
    """Let a tensor on the CPU have its values in pages of its own, as `paged_zeros` makes them. It stays the same object. One that
    is not all of its storage stays where it is.
    """
    storage_bytes, numel = tensor.untyped_storage().nbytes(), tensor.numel()
    if not tensor.is_cpu or tensor.nbytes < _WORTH_A_PAGE or tensor.nbytes != storage_bytes:
        return
    before = tensor.detach().as_strided((numel,), (1,))
    paged = paged_zeros(numel, tensor.dtype, tensor.device).copy_(before)
    tensor.data = paged.as_strided(tensor.shape, tensor.stride())
    release(before)


def release(part: Tensor) -> None:
    """Give back the whole pages within a part of a tensor whose values nobody needs any more, before the tensor is dropped. They read
    as zeros from now on. On other devices than the CPU and other systems than Linux, nothing happens.

    Args:
        part: 1-D, contiguous, in memory of this process's own, of its C heap too, or in what it shares.
    """
    if not part.is_cpu or part.numel() == 0 or sys.platform != "linux":
        return
    begin = -(-part.data_ptr() // PAGESIZE) * PAGESIZE
    end = (part.data_ptr() + part.nbytes) // PAGESIZE * PAGESIZE
    advise = _c_function("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # It is memory of one kind or the other.
    if begin < end and advise is not None and advise(begin, end - begin, _MADV_REMOVE) != 0:
        advise(begin, end - begin, _MADV_DONTNEED)


def trim_heap() -> None:
    """Have the C allocator give back what it holds and nobody uses, where it is one that can."""
    trim = _c_function("malloc_trim", ctypes.c_size_t)
    if trim is not None:
        trim(0)


@cache
def _c_function(name: str, *arguments: type) -> Callable[..., int] | None:
    """A function of the C library that returns an int; None where there is none of this name."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function.argtypes = arguments
        function.restype = ctypes.c_int
    return function
