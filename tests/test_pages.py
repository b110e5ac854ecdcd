"""Pages that go back to the system while what lies around them stays."""

from __future__ import annotations

import os
from mmap import MAP_SHARED, PAGESIZE, mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transports import resident_pages

from zeroopt.pages import folded, paged_zeros, paged_zeros_like, release, trim_heap

CPU = torch.device("cpu")
PAGES = 64
NUMEL = PAGES * PAGESIZE // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("numel", [0, 1, 1000, NUMEL])
def test_zeros_of_any_size(numel: int, dtype: torch.dtype) -> None:
    made = paged_zeros(numel, dtype, CPU)
    assert made.shape == (numel,) and made.dtype is dtype and not made.any()
    again = paged_zeros_like(made, torch.float64)
    assert again.shape == (numel,) and again.dtype is torch.float64 and not again.any()


def shared_values() -> Tensor:
    descriptor = os.memfd_create("pages")
    os.ftruncate(descriptor, NUMEL * 4)
    values = torch.frombuffer(mmap(descriptor, NUMEL * 4, flags=MAP_SHARED), dtype=torch.float32)
    os.close(descriptor)
    return values


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
@pytest.mark.parametrize("shared", [False, True])
def test_whole_pages_of_a_part_go_and_the_rest_stays(shared: bool) -> None:
    values = shared_values() if shared else paged_zeros(NUMEL, torch.float32, CPU)
    values.fill_(1.0)
    before = resident_pages(values.data_ptr(), values.nbytes)
    begin, end = PAGESIZE // 8, NUMEL - PAGESIZE // 8  # in the middle of the first page and of the last
    release(values[begin:end])
    assert before - resident_pages(values.data_ptr(), values.nbytes) >= PAGES - 2
    assert torch.all(values[:begin] == 1) and torch.all(values[end:] == 1)
    first, last = PAGESIZE // 4, NUMEL - PAGESIZE // 4
    assert not values[first:last].any() and torch.all(values[begin:first] == 1)


def test_less_than_a_page_stays() -> None:
    values = paged_zeros(NUMEL, torch.float32, CPU).fill_(1.0)
    release(values[1 : PAGESIZE // 4])
    release(values[:0])
    assert torch.all(values == 1)


def test_a_heap_without_anything_to_give_back_is_left_alone() -> None:
    before = torch.arange(1000)
    trim_heap()
    trim_heap()
    assert torch.equal(before, torch.arange(1000))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_folded_memory_is_as_large_as_a_period() -> None:
    period = 16 * PAGESIZE // 4
    values = folded(20 * period + 1000, period, torch.float32, CPU)
    descriptors = len(os.listdir("/proc/self/fd"))
    numbers = torch.arange(period, dtype=torch.float32)
    values[3 * period : 4 * period] = numbers
    assert torch.equal(values[: 20 * period].view(20, period), numbers.expand(20, period))
    assert torch.equal(values[20 * period :], numbers[:1000])
    mappings = Path("/proc/self/maps").read_text().count("memfd:zeroopt")
    del values
    assert mappings - Path("/proc/self/maps").read_text().count("memfd:zeroopt") == 21, "it goes with the tensor"
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_period_or_less_is_not_folded() -> None:
    for numel in (0, 10, PAGESIZE):
        values = folded(numel, PAGESIZE, torch.float32, CPU)
        assert values.shape == (numel,) and not values.any()
