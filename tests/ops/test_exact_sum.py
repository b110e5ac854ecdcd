"""Exact sums of parts: those of whole numbers, by the kernel and by torch's operations."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeroopt import ConfigError, ops
from zeroopt.ops import by_torch

WIDTH = 20
ROUNDERS = [math.ldexp(1.5, 52 - k * WIDTH) for k in range(1, ops.SUM_PARTS + 1)]


def parts_of(term: Fraction) -> list[Fraction]:
    """Each the multiple of its power of two that is nearest to what is left, of two such ones the even one."""
    parts = []
    for k in range(1, ops.SUM_PARTS + 1):
        unit = Fraction(1, 2 ** (k * WIDTH))
        parts.append(round(term / unit) * unit)
        term -= parts[-1]
    return parts


@given(
    values=st.lists(st.floats(-1, 1, width=32, exclude_min=True, exclude_max=True), max_size=70),
    exponent=st.integers(-3, 0),
    squared=st.booleans(),
)
def test_sums_are_exact(values: list[float], exponent: int, squared: bool) -> None:
    scale = torch.tensor(2.0**exponent, dtype=torch.float64)
    terms = [abs(Fraction(value) * Fraction(2) ** exponent) for value in values]
    by_term = [parts_of(term * term if squared else term) for term in terms]
    expected = [float(sum(parts[k] for parts in by_term)) for k in range(ops.SUM_PARTS)]
    sums = ops.sum_in_parts(torch.tensor(values), scale=scale, squared=squared, rounders=ROUNDERS)
    assert sums.tolist() == expected


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("squared", [True, False])
def test_torchs_operations_and_threads_give_the_same_bits(threads: int, squared: bool) -> None:
    values = torch.rand(300_001, generator=torch.Generator().manual_seed(0)) - 0.5
    scale = torch.ones((), dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sums = ops.sum_in_parts(values, scale=scale, squared=squared, rounders=ROUNDERS)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums, by_torch.sum_in_parts(values, scale, ROUNDERS, squared=squared))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    values = (torch.rand(100, generator=torch.Generator().manual_seed(1)) - 0.5).to(dtype)
    scale = torch.ones((), dtype=torch.float64)
    expected = by_torch.sum_in_parts(values, scale, ROUNDERS, squared=True)
    assert torch.equal(ops.sum_in_parts(values, scale=scale, squared=True, rounders=ROUNDERS), expected)
    if dtype is not torch.float64:
        kernel = ops.sum_in_parts(values.float(), scale=scale, squared=True, rounders=ROUNDERS)
        assert torch.equal(kernel, expected)


def test_what_does_not_fit_is_refused() -> None:
    scale = torch.ones((), dtype=torch.float64)
    with pytest.raises(ConfigError, match="expected 3 rounders, got 1"):
        ops.sum_in_parts(torch.zeros(4), scale=scale, squared=True, rounders=[1.0])
    with pytest.raises(ConfigError, match="values"):
        ops.sum_in_parts(torch.zeros(4, 4).t()[1:], scale=scale, squared=True, rounders=ROUNDERS)
