"""Parts of a large tensor that look as if torch had made each by itself.

Much of what saves, copies or shares tensors looks at their storages: safetensors and all that builds on it take tensors of one
storage for one tensor, `torch.save` writes the whole storage of a view, and DTensors cannot be copied with a storage offset.
So whatever others get to see of a bucket has a storage of its own, over its part of the bucket's memory.

Each of these storages keeps all of the memory alive. On CUDA, the allocator knows the buffer and not its parts:
`record_stream` of a part does nothing, or, with `backend:cudaMallocAsync`, is an error, and a part cannot go to another process as a
CUDA IPC handle. Buckets are only freed when their parameters move out of them, on the stream on which they were made.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack


def with_own_storage(part: Tensor) -> Tensor:
    """The same elements in the same memory, as a tensor whose storage begins and ends with them, at offset 0, and whose version
    counter is its own.

    Args:
        part: dense, its dimensions in whatever order, as parameters are.
    """
    if part.is_meta:  # there is no memory, and DLPack knows no such device
        return torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=part.device)
    # In one dimension, for DLPack does not keep the strides of dimensions of size 1.
    flat = part.detach().as_strided((part.numel(),), (1,))
    with _current(part.device):
        return from_dlpack(flat).as_strided(part.shape, part.stride()).detach()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Within it, a device is the current one: DLPack hands out tensors of no other."""
    if device.type == "cpu":
        return nullcontext()
    current: AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return current
