"""Memory for flat buffers, which live as long as the training and are large."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

# Buffers below a huge page gain nothing from pages of their own.
_OWN_PAGES_BYTES = 1 << 20


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 1-D tensor of zeros that no parameter of autograd's shares memory with.

    On the CPU large ones get pages of their own rather than a place in the heap: long-lived blocks between the gradients and
    activations that come and go would leave holes that the C allocator cannot give back (measured: 30 MiB and more with
    layers of 4 MiB). Pages that are never touched cost nothing, and huge ones are asked for.
    """
    num_bytes = numel * dtype.itemsize
    if device.type != "cpu" or num_bytes < _OWN_PAGES_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(numel, dtype=dtype, device=device)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            pass
    return torch.frombuffer(pages, dtype=dtype)  # keeps the mapping for as long as the tensor's storage lives
