"""What arguments of kernels are checked for, and the words in which it is said what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zeroopt import ConfigError, NotSupportedError
from zeroopt.ops.checks import (
    check_device,
    check_disjoint,
    check_flat,
    check_none_overlap,
    check_table,
    dtype_code,
    is_dense,
    lies_as,
    require,
)

MEMORY = torch.zeros(100)
META = torch.zeros(4, device="meta")


def message_of(check: Callable[..., Any], *args: Any, error: type[Exception] = ConfigError) -> str:
    with pytest.raises(error) as caught:
        check(*args)
    return str(caught.value)


def test_what_is_required() -> None:
    require(True, "no good")
    assert message_of(require, False, "no good") == "no good"


def test_dtypes_have_codes_of_their_own() -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    assert sorted(dtype_code("x", torch.zeros(1, dtype=dtype)) for dtype in dtypes) == [0, 1, 2, 3]


def test_dtypes_and_devices_that_no_kernel_takes() -> None:
    expected = "expected grad to be float32, float64, bfloat16 or float16, got torch.int32"
    assert message_of(dtype_code, "grad", torch.zeros(1, dtype=torch.int32)) == expected
    expected = "there are kernels for CPU and CUDA tensors, grad is on meta"
    assert message_of(dtype_code, "grad", META, error=NotSupportedError) == expected


def test_devices_are_alike() -> None:
    check_device("out", torch.zeros(1), MEMORY)
    assert message_of(check_device, "out", META, MEMORY) == "expected out to be on cpu, got meta"


@pytest.mark.parametrize("numel", [0, 1, 5])
def test_flat(numel: int) -> None:
    check_flat("codes", MEMORY[3 : 3 + numel], numel)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (MEMORY[:4], r"shape [4] with strides (1,)"),
        (MEMORY[:5].view(1, 5), "shape [1, 5] with strides (5, 1)"),
        (MEMORY[:10:2], "shape [5] with strides (2,)"),
        (MEMORY[0], "shape [] with strides ()"),
    ],
)
def test_not_flat(value: Tensor, got: str) -> None:
    expected = f"expected codes to be 1-D and contiguous with 5 elements, got {got}"
    assert message_of(check_flat, "codes", value, 5) == expected


@given(st.integers(0, 20), st.integers(0, 6), st.integers(0, 20), st.integers(0, 6))
@settings(max_examples=40)
def test_overlap_is_a_byte_in_common(first: int, n: int, second: int, m: int) -> None:
    one, other = MEMORY[first : first + n], MEMORY[second : second + m].view(torch.int32)
    overlaps = bool(set(range(first, first + n)) & set(range(second, second + m)))
    for pair in (("a", one, "b", other), ("b", other, "a", one)):
        if overlaps:
            words = f"expected {pair[0]} and {pair[2]} not to overlap in memory; clone one of them"
            assert message_of(check_disjoint, *pair) == words
        else:
            check_disjoint(*pair)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=6))
@settings(max_examples=40)
def test_of_many_no_two_overlap(ranges: list[tuple[int, int]]) -> None:
    tensors = [(f"t{i}", MEMORY[begin : begin + n]) for i, (begin, n) in enumerate(ranges)]
    elements = [element for begin, n in ranges for element in range(begin, begin + n)]
    if len(set(elements)) == len(elements):
        check_none_overlap(iter(tensors))
    else:
        message = message_of(check_none_overlap, iter(tensors))
        named = message.removeprefix("expected ").removesuffix(" not to overlap in memory").split(" and ")
        one, other = (range(ranges[i][0], sum(ranges[i])) for i in (int(name[1:]) for name in named))
        assert set(one) & set(other), "those that are named"


@given(st.lists(st.integers(0, 3), max_size=4), st.data())
@settings(max_examples=40)
def test_what_has_no_gaps_is_dense(sizes: list[int], data: st.DataObject) -> None:
    dims = data.draw(st.sampled_from(list(permutations(range(len(sizes))))))
    tensor = torch.zeros(sizes).permute(dims)
    assert is_dense(tensor)
    if tensor.numel() > 1:
        wide = torch.zeros([*sizes, 2])[..., 0].permute(dims)
        assert not is_dense(wide), "gaps"


@pytest.mark.parametrize(
    ("value", "dense"),
    [
        (torch.zeros(()), True),
        (torch.zeros(1).as_strided((1, 1), (7, 9)), True),
        (torch.zeros(6).as_strided((3, 1, 2), (2, 55, 1)), True),
        (torch.zeros(6).as_strided((2, 1, 3), (1, 55, 2)), True),
        (torch.zeros(1).expand(3), False),
        (torch.zeros(6).as_strided((2, 3), (1, 1)), False),
        (torch.zeros(6, 4)[:, :3], False),
        (torch.zeros(6, 4)[1:3], True),
        (torch.zeros(0, 4).t(), True),
    ],
)
def test_dense(value: Tensor, dense: bool) -> None:
    assert is_dense(value) == dense


@pytest.mark.parametrize(
    ("size", "strides", "others", "expected"),
    [
        ((), (), (), True),
        ((2, 3), (3, 1), (3, 1), True),
        ((2, 3), (3, 1), (1, 2), False),
        ((2, 1, 3), (1, 55, 2), (1, 7, 2), True),
        ((2, 1, 3), (1, 7, 2), (3, 7, 1), False),
        ((1,), (0,), (1,), True),
    ],
)
def test_strides_of_one_element_say_nothing(
    size: tuple[int, ...], strides: tuple[int, ...], others: tuple[int, ...], expected: bool
) -> None:
    assert lies_as(MEMORY.as_strided(size, strides), others) == expected


def test_tables() -> None:
    check_table("groups", torch.zeros(2, 3), torch.float32, (2, 3), MEMORY)
    wrong = [
        (torch.zeros(2, 3).double(), "expected groups to be torch.float32, got torch.float64"),
        (torch.zeros(3, 2), "expected groups to be contiguous of shape [2, 3], got [3, 2]"),
        (torch.zeros(3, 2).t(), "expected groups to be contiguous of shape [2, 3], got [2, 3]"),
        (torch.zeros(2, 3, device="meta"), "expected groups to be on cpu, got meta"),
    ]
    for table, message in wrong:
        assert message_of(check_table, "groups", table, torch.float32, (2, 3), MEMORY) == message
