"""What stands for kernels on other devices gives their bits. It is compared with them on the CPU, which has both."""

from __future__ import annotations

import pytest
import torch

from zeroopt import ops
from zeroopt.ops import by_torch

from .test_move import DTYPES, HALVES, REDUCE_PAIRS, SPECIAL, random_bits, same_bits

NUMEL = 5_000


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 0.0, 2.0**-20])
@pytest.mark.parametrize("dst", DTYPES, ids=str)
@pytest.mark.parametrize("src", DTYPES, ids=str)
def test_pack_gives_the_bits_of_the_kernel(src: torch.dtype, dst: torch.dtype, scale: float) -> None:
    values = torch.cat([random_bits(src, NUMEL, seed=0), torch.tensor(SPECIAL, dtype=src)])
    expected, got = (torch.empty(values.numel(), dtype=dst) for _ in range(2))
    ops.pack(values, expected, scale=scale)
    by_torch.pack(values, got, scale)
    assert same_bits(got, expected)


def test_pack_goes_by_the_order_in_memory() -> None:
    values = torch.randn(6, 4).t()
    got = torch.empty(6, 4, dtype=torch.bfloat16).t()
    by_torch.pack(values, got, 0.5)
    assert torch.equal(got, (values * 0.5).bfloat16())
    room = torch.zeros(30)
    by_torch.pack(torch.ones(2, 3), room[3:9], 2.0)
    assert room.tolist() == [0.0] * 3 + [2.0] * 6 + [0.0] * 21


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_in_place(dtype: torch.dtype) -> None:
    values, expected = random_bits(dtype, NUMEL, seed=1), random_bits(dtype, NUMEL, seed=1)
    ops.pack(expected, expected, scale=0.3)
    by_torch.pack(values, values, 0.3)
    assert same_bits(values, expected)


@pytest.mark.parametrize("has_base", [False, True], ids=["alone", "base"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 8, 13])
@pytest.mark.parametrize(("slice_dtype", "out_dtype"), REDUCE_PAIRS, ids=str)
def test_reduce_gives_the_bits_of_the_kernel(
    slice_dtype: torch.dtype, out_dtype: torch.dtype, count: int, has_base: bool
) -> None:
    slices = [random_bits(slice_dtype, NUMEL, seed=number) for number in range(count)]
    base = random_bits(out_dtype, NUMEL, seed=99) if has_base else None
    expected, got = (torch.empty(NUMEL, dtype=out_dtype) for _ in range(2))
    ops.reduce(slices, expected, base=base)
    by_torch.reduce(slices, got, base)
    assert same_bits(got, expected)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_reduce_changes_nothing_but_out(half: torch.dtype) -> None:
    slices = [torch.ones(4, dtype=half), torch.full((4,), 2.0, dtype=half)]
    base = torch.full((4,), 10.0)
    by_torch.reduce(slices, base, base)
    assert base.tolist() == [13.0] * 4 and slices[0].tolist() == [1.0] * 4
    by_torch.reduce(slices, slices[1], None)
    assert slices[1].tolist() == [3.0] * 4


def test_gradients_are_not_recorded() -> None:
    param, out = torch.ones(3, requires_grad=True), torch.zeros(3)
    by_torch.pack(param, out, 2.0)
    by_torch.reduce([param, param], out, out)
    assert not out.requires_grad and out.tolist() == [4.0] * 3
