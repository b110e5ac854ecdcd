"""The planner, by its property tests: Hypothesis makes their arguments out of an input."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.csrc import test_fill_buckets, test_owners, test_partition

PROPERTIES: tuple[Any, ...] = (
    test_partition.test_every_element_has_one_owner,
    test_partition.test_layout_of_buckets,
    test_partition.test_segments_of_any_range,
    test_partition.test_whole_parameters_have_one_owner_each,
    test_partition.test_buckets_are_those_of_the_plain_search,
    test_owners.test_layout,
    test_owners.test_the_busiest_has_little_more_than_it_must,
    test_fill_buckets.test_parameters_lie_as_they_arrive,
    test_fill_buckets.test_no_bucket_is_larger_than_it_has_to_be,
)


def plan(data: bytes) -> None:
    """The property that the first byte chooses, of what the others say."""
    check: Callable[[bytes], bytes | None] = PROPERTIES[
        data[0] % len(PROPERTIES) if data else 0
    ].hypothesis.fuzz_one_input
    check(data[1:])


def examples() -> list[bytes]:
    """Some for each property."""
    rng = random.Random(0)
    return [bytes([number]) + rng.randbytes(200) for number in range(len(PROPERTIES)) for _ in range(4)]
