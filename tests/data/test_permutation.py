"""A shuffled order that is computed place by place."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from zeroopt.data.permutation import shuffled

KEYS = st.tuples(st.integers(-(2**70), 2**70), st.integers(0, 2**40))


@given(st.integers(1, 2000), KEYS)
def test_each_sample_has_one_place(num_samples: int, key: tuple[int, int]) -> None:
    order = shuffled(np.arange(num_samples), num_samples, key)
    assert sorted(order.tolist()) == list(range(num_samples))


@given(st.integers(2**33, 2**60), KEYS, st.lists(st.integers(0, 2**33 - 1), min_size=1, max_size=5))
def test_places_are_found_one_by_one(num_samples: int, key: tuple[int, int], places: list[int]) -> None:
    together = shuffled(np.array(places), num_samples, key)
    assert [int(shuffled(np.array([place]), num_samples, key)[0]) for place in places] == together.tolist()
    assert together.min() >= 0 and together.max() < num_samples


def test_each_sample_is_as_likely_at_each_place() -> None:
    num_samples, draws = 7, 3000
    found = np.stack([shuffled(np.arange(num_samples), num_samples, (5, epoch)) for epoch in range(draws)])
    for place in range(num_samples):
        counts = Counter(found[:, place].tolist())
        expected = draws / num_samples
        chi_square = sum((counts[sample] - expected) ** 2 / expected for sample in range(num_samples))
        assert chi_square < 30, "6 degrees of freedom: by chance in one of 25,000"
    following = Counter(zip(found[:, 0].tolist(), found[:, 1].tolist(), strict=True))
    expected = draws / (num_samples * (num_samples - 1))
    assert len(following) == 42
    assert sum((count - expected) ** 2 / expected for count in following.values()) < 90, "41 degrees of freedom"


def test_the_order_is_the_same_for_ever() -> None:
    assert shuffled(np.arange(10), 10, (0, 0)).tolist() == [2, 0, 8, 1, 9, 7, 4, 5, 6, 3]
