"""Sums that are exact, and so the same in any order: of terms that are cut into multiples of a few powers of two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from . import by_torch
from .checks import check_flat, require

SUM_PARTS = 3  # into which a term is cut


def sum_in_parts(values: Tensor, *, scale: Tensor, squared: bool, rounders: Sequence[float]) -> Tensor:
    """The sums of the parts of ``|values * scale|``, or of its squares. Not collective.

    A part is what is left of a term by those before, rounded to a multiple of a power of two: ``(rest + r) - r`` with r of `rounders`.
    So their sum is exact where it is below 2^53 times that power of two. On devices without this kernel, and in other dtypes, torch's
    operations do it, in more passes.

    Args:
        values: 1-D, contiguous, float32, float64, bfloat16 or float16.
        scale: 0-dim, float64, on the same device.
        rounders: as many as parts, by falling size.

    Returns:
        float64 [parts], on that device.

    Raises:
        ConfigError: a layout or a number of rounders does not fit.
    """
    check_flat("values", values, values.numel())
    require(len(rounders) == SUM_PARTS, f"expected {SUM_PARTS} rounders, got {len(rounders)}")
    if not values.is_cpu or values.dtype is not torch.float32:
        return by_torch.sum_in_parts(values, scale, rounders, squared=squared)
    sums = torch.empty(SUM_PARTS, dtype=torch.float64, device="cpu")
    threads = torch.get_num_threads()
    _C.sum_in_parts(values.data_ptr(), values.numel(), scale.item(), squared, list(rounders), sums.data_ptr(), threads)
    return sums
