"""Memory for sums on their way is used again, and its most is known."""

from __future__ import annotations

import torch

from zeroopt.storage.slice_sums import SliceSums

CPU = torch.device("cpu")


def test_memory_is_used_again() -> None:
    sums = SliceSums()
    first, second = sums.take(100, torch.float32, CPU), sums.take(50, torch.float64, CPU)
    assert first.shape == (100,) and second.dtype is torch.float64
    addresses = {first.data_ptr(), second.data_ptr()}
    assert sums.nbytes == 800
    sums.give_back(first)
    sums.give_back(second)
    assert {sums.take(80, torch.float32, CPU).data_ptr() for _ in range(2)} == addresses
    assert sums.nbytes == 800


def test_a_rank_may_step_nothing() -> None:
    sums = SliceSums()
    nothing = sums.take(0, torch.float32, CPU)
    assert nothing.numel() == 0
    sums.give_back(nothing)
