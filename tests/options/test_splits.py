"""Of what parts parameters consist: what may be given, and what it says of a shape."""

from __future__ import annotations

from typing import Any

import pytest

from zeroopt import ConfigError, Split
from zeroopt.options.splits import read_splits, split_of


@pytest.mark.parametrize(
    ("split", "shape", "sizes"),
    [
        (Split(3), (12, 5), [4, 4, 4]),
        (Split((8, 2, 2)), (12, 5), [8, 2, 2]),
        (Split([8, 4]), (12, 5), [8, 4]),  # type: ignore[arg-type]
        (Split(5, dim=1), (12, 5), [1] * 5),
    ],
)
def test_sizes(split: Split, shape: tuple[int, ...], sizes: list[int]) -> None:
    assert split.sizes("qkv", shape) == sizes
    assert split.count == len(sizes)


@pytest.mark.parametrize(
    ("split", "shape"), [(Split(5), (12, 5)), (Split((8, 2)), (12, 5)), (Split(3, dim=2), (12, 5))]
)
def test_what_a_parameter_does_not_consist_of(split: Split, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"parameter 'qkv' of shape \[12, 5\] does not consist of"):
        split.sizes("qkv", shape)


@pytest.mark.parametrize("given", [3, {"qkv": 0}, {"qkv": True}, {"qkv": []}, {"qkv": [3, -1]}, {"qkv": "3"}, {1: 3}])
def test_what_is_no_split(given: Any) -> None:
    with pytest.raises(ConfigError, match="expected"):
        read_splits(given)


def test_dim_has_to_be_one() -> None:
    with pytest.raises(ConfigError, match="expected the dim of a split to be 0 or more"):
        Split(3, dim=-1)


def test_the_first_pattern_that_matches() -> None:
    splits = read_splits({"h.0.qkv": 2, "*.qkv": [1, 2], "h.1.qkv": Split(9)})
    assert splits is not None
    assert split_of(splits, "h.0.qkv") == Split(2)
    assert split_of(splits, "h.1.qkv") == Split((1, 2))
    assert split_of(splits, "qkv") is None
    assert read_splits(None) is None
