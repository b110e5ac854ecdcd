"""Ranks do something together, or fail together."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from short_timeouts import lose_patience
from worker_pool import RankError, RunOnRanks

from zeroopt import CheckpointError, CollectiveError
from zeroopt.checkpoint.format.together import together


class Unsendable(Exception):
    """Cannot be unpickled: its constructor wants more than its text."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


def squares_of_sum() -> int:
    group = dist.group.WORLD
    return together(group, "counting", group.rank, lambda ranks: [sum(ranks) ** (rank + 1) for rank in ranks])


def test_each_rank_has_its_own_of_what_rank_0_makes_of_all(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(3, squares_of_sum) == [3, 9, 27]
    assert together(None, "counting", lambda: 5, lambda values: [sum(values) + 1]) == 6


def fail(failing: dict[int, BaseException], combining: BaseException | None) -> None:
    group = dist.group.WORLD

    def work() -> int:
        if group.rank() in failing:
            raise failing[group.rank()]
        return 0

    def combine(values: list[Any]) -> list[Any]:
        if combining is not None:
            raise combining
        return values

    together(group, "drawing lots", work, combine)


@pytest.mark.parametrize(
    ("failing", "combining", "text"),
    [
        (
            {1: OSError(28, "No space left on device", "a.bin")},
            None,
            "on rank 1: [Errno 28] No space left on device: 'a.bin'",
        ),
        ({0: CheckpointError("no"), 2: KeyError("x")}, None, "on rank 0: no; on rank 2: KeyError: 'x'"),
        ({}, ValueError("odd"), "on rank 0: ValueError: odd"),
        ({1: ValueError("first")}, ValueError("never reached"), "on rank 1: ValueError: first"),
    ],
)
def test_all_ranks_fail_with_the_same_text(
    failing: dict[int, BaseException], combining: BaseException | None, text: str, run_on_ranks: RunOnRanks
) -> None:
    expected = RankError("CheckpointError", f"drawing lots failed {text}")
    assert run_on_ranks.outcomes(3, fail, failing, combining) == [expected] * 3


def fail_unsendably() -> None:
    group = dist.group.WORLD

    def work() -> None:
        if group.rank() == 1:
            raise Unsendable("far", "away")

    together(group, "drawing lots", work, lambda values: values)


def test_what_cannot_be_sent_is_told_as_text(run_on_ranks: RunOnRanks) -> None:
    expected = RankError("CheckpointError", "drawing lots failed on rank 1: Unsendable: faraway")
    assert run_on_ranks.outcomes(2, fail_unsendably) == [expected] * 2


def test_an_interrupted_rank_stops_and_the_others_hear_of_it(run_on_ranks: RunOnRanks) -> None:
    text = "drawing lots failed on rank 1: KeyboardInterrupt: "
    assert run_on_ranks.outcomes(2, fail, {1: KeyboardInterrupt()}, None) == [
        RankError("CheckpointError", text),
        RankError("KeyboardInterrupt", ""),
    ]
    assert run_on_ranks.outcomes(2, fail, {}, KeyboardInterrupt()) == [
        RankError("KeyboardInterrupt", ""),
        RankError("CheckpointError", "drawing lots failed on rank 0: KeyboardInterrupt: "),
    ]


def alone() -> str:
    """The error of a rank whose peer does something else."""
    group = dist.new_group()
    lose_patience(0.2)
    if dist.get_rank() == 1:
        return ""
    with pytest.raises(CollectiveError) as raised:
        together(group, "saving the checkpoint x", lambda: 0, lambda values: values)
    return str(raised.value)


def test_a_rank_alone_hears_that_all_must_come(run_on_ranks: RunOnRanks) -> None:
    (error, _) = run_on_ranks(2, alone)
    assert "saving the checkpoint x: failed for want of rank 1" in error
    assert "let all of them call it, not rank 0 alone" in error


def test_many_failing_ranks_are_counted(run_on_ranks: RunOnRanks) -> None:
    failing = {rank: CheckpointError(f"e{rank}") for rank in range(4)}
    [error, *_] = run_on_ranks.outcomes(4, fail, failing, None)
    assert error == RankError(
        "CheckpointError", "drawing lots failed on rank 0: e0; on rank 1: e1; on rank 2: e2; and on 1 more ranks"
    )
