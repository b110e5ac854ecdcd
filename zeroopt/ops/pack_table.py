"""Where arrays lie in a flat one into which others of their kind are packed again and again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import _C
from .checks import DTYPE_CODES, GRAD_COLUMN, NUMEL_COLUMN, PARAM_COLUMN, ROW_COLUMNS, current_stream
from .devices import has_kernels
from .layouts import make_layouts


class PackTable:
    """`pack_segments` on a device, with all that stays the same written down once: a call costs the host a microsecond an array.

    Args:
        shapes, strides: of the arrays, which are dense.
        offsets: of their first elements in the flat array, in which no two overlap.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]], offsets: Sequence[int]
    ) -> None:
        self._layouts = make_layouts(shapes, strides)
        self._offsets = np.array(offsets, dtype=np.int64)
        self._numels = np.array([shape.numel() for shape in shapes], dtype=np.int64)
        self._table = np.zeros((len(shapes), ROW_COLUMNS), dtype=np.int64)
        self._table[:, NUMEL_COLUMN] = self._numels
        self._active = (self._numels > 0).astype(np.uint8)

    def pack(self, sources: Sequence[Tensor], full: Tensor, *, scale: float = 1.0) -> bool:
        """``full[offset:] = source * scale`` for each source, cast. What lies in between stays. Not collective.

        Args:
            sources: one for each array. None overlaps another one.
            full: 1-D, contiguous, and long enough.
            scale: as that of `pack_segments`.

        Returns:
            Whether it was done. Otherwise nothing was: there are no kernels for the device, or sources are not as they are to lie in
            the flat array, or not of one dtype, or views with the other sign, or lie in it, elsewhere than where they belong.
        """
        if not full.is_cuda or not has_kernels(full.device) or any(map(Tensor.is_neg, sources)):
            return False
        found = self._layouts.look(sources, full.device)
        if found is None:
            return False
        (addresses, dtype), begin = found, full.data_ptr()
        targets = begin + self._offsets * full.itemsize
        is_in = (addresses < begin + full.nbytes) & (addresses + self._numels * dtype.itemsize > begin)
        is_in_place = (addresses == targets) & (dtype.itemsize == full.itemsize)
        if (is_in & ~is_in_place).any():
            return False
        self._table[:, GRAD_COLUMN], self._table[:, PARAM_COLUMN] = addresses, targets
        src_code, dst_code = DTYPE_CODES[dtype], DTYPE_CODES[full.dtype]
        arguments = (self._table.ctypes.data, self._active.ctypes.data, len(sources), src_code, dst_code, scale)
        with torch.cuda.device(full.device):
            _C.cuda_pack_segments(*arguments, current_stream(full))
        return True
