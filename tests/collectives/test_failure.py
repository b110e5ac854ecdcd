"""The message of a failed collective says what was going on, for want of which ranks, and what to do where that is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch.distributed as dist

from zeroopt.collectives.failure import (
    ADVICE,
    describe_failure,
    is_timeout,
    name_ranks,
    the_other_rank,
)

LOST = "Connection closed by peer"
TIMED_OUT = "Timed out waiting 200ms for recv operation to complete"


@pytest.mark.parametrize(
    ("missing", "named"),
    [([3], "rank 3"), ([None], "other ranks"), ([2, 0, 2], "rank 2, rank 0"), ([1, None, None], "rank 1, other ranks")],
)
def test_each_missing_rank_is_named_once(missing: Sequence[int | None], named: str) -> None:
    assert describe_failure("all-gather", missing, LOST) == f"all-gather: failed for want of {named}: {LOST}"


def test_only_who_waited_in_vain_is_told_that_ranks_have_diverged() -> None:
    assert ADVICE not in describe_failure("gather", [1], LOST, "Bring a friend")
    told = describe_failure("gather", [1], TIMED_OUT)
    assert told.endswith(f": {TIMED_OUT}. Unless they are stopped or busy, the ranks have diverged. {ADVICE}")


def test_further_advice_comes_last() -> None:
    assert describe_failure("gather", [1], LOST, "Bring a friend").endswith(f"{LOST}. Bring a friend")
    assert describe_failure("gather", [1], TIMED_OUT, "Bring a friend").endswith(f"{ADVICE}. Bring a friend")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (TIMED_OUT, True),
        ("Watchdog caught collective operation TIMEOUT", True),
        ("operation timeout", True),
        (LOST, False),
        ("", False),
    ],
)
def test_the_backends_words_tell_a_timeout(reason: str, expected: bool) -> None:
    assert is_timeout(reason) is expected


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([1], "rank 1"),
        ([0, 2], "ranks 0, 2"),
        (range(8), "ranks 0, 1, 2, 3, 4, 5, 6, 7"),
        (range(10, 22), "ranks 10, 11, 12, 13, 14, 15, 16, 17 and 4 others"),
    ],
)
def test_of_many_ranks_the_first_ones_are_named(ranks: Sequence[int], named: str) -> None:
    assert name_ranks(ranks) == named


@pytest.mark.parametrize(("rank", "size", "other"), [(0, 2, 1), (1, 2, 0), (0, 1, None), (1, 3, None)])
def test_the_other_of_two_is_known(rank: int, size: int, other: int | None) -> None:
    assert the_other_rank(dist.ProcessGroup(rank, size)) == other  # type: ignore[call-arg]
