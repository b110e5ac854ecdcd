"""Whether tensors lie in memory as they are expected to, and where: asked of all gradients of a bucket, in every backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _C
from .checks import DTYPE_CODES

Found = tuple[NDArray[np.int64], torch.dtype]


class Layouts(Protocol):
    """Arrays of certain shapes and strides."""

    def look(self, tensors: Sequence[Tensor], device: torch.device) -> Found | None:
        """The addresses of tensors, valid until it is called again, and their dtype. None where one is not laid out as its array is,
        or is elsewhere than on a device, or not all are of one dtype that kernels know."""


class LayoutsInPython:
    """By what torch tells of each tensor.

    Args:
        shapes, strides: of the arrays.
    """

    def __init__(self, shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]]) -> None:
        self._shapes, self._strides = list(shapes), list(strides)

    def look(self, tensors: Sequence[Tensor], device: torch.device) -> Found | None:
        # One pass after the other, without a call in Python for each.
        dtypes = {tensor.dtype for tensor in tensors}
        fits = (
            len(dtypes) == 1
            and dtypes.issubset(DTYPE_CODES)
            and {tensor.layout for tensor in tensors} == {torch.strided}
            and {tensor.device for tensor in tensors} == {device}
            and [tensor.shape for tensor in tensors] == self._shapes
            and [tensor.stride() for tensor in tensors] == self._strides
        )
        return (np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors)), dtypes.pop()) if fits else None


class LayoutsByDLPack:
    """By DLPack's C exchange API, a tenth of the time.

    Args:
        shapes, strides: of the arrays.
    """

    def __init__(self, shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]]) -> None:
        self._layouts = _C.Layouts(_EXCHANGE, list(map(list, shapes)), list(map(list, strides)))
        self._addresses = np.zeros(len(shapes), dtype=np.int64)
        self._out = self._addresses.ctypes.data

    def look(self, tensors: Sequence[Tensor], device: torch.device) -> Found | None:
        found = self._layouts.look(tensors, self._out) if len(tensors) == len(self._addresses) else None
        dtype = None if found is None else _DTYPES.get(found[:2])
        if found is None or dtype is None or found[2:] != (_DEVICES.get(device.type), device.index or 0):
            return None
        return self._addresses, dtype


_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # torch 2.10 and later
_DTYPES = {(2, 32): torch.float32, (2, 64): torch.float64, (4, 16): torch.bfloat16, (2, 16): torch.float16}
_DEVICES = {"cpu": 1, "cuda": 2}


def make_layouts(shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]]) -> Layouts:
    """For arrays of these shapes and strides."""
    if _EXCHANGE is None or not hasattr(_C, "Layouts"):
        return LayoutsInPython(shapes, strides)
    return LayoutsByDLPack(shapes, strides)
