"""Failures name the rank that is lost. `test_control.py` and `tests/training/test_faults.py` have what becomes of it on ranks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist
from worker_pool import RunOnRanks

from zeroopt import CollectiveError, StateError
from zeroopt.collectives import lost
from zeroopt.collectives.lost import named_failures, roll_call_s

LOST = "Connection closed by peer"


def test_calls_of_torch_fail_as_transports_do() -> None:
    cause = RuntimeError(LOST)
    with pytest.raises(CollectiveError) as raised, named_failures("barrier", 1, "Bring a friend"):
        raise cause
    assert str(raised.value) == f"barrier: failed for want of rank 1: {LOST}. Bring a friend"
    assert raised.value.__cause__ is cause


@pytest.mark.parametrize("error", [StateError("ours"), CollectiveError("named before"), KeyError("a bug")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, named_failures("barrier", None):
        raise error
    assert raised.value is error and error.__cause__ is None


def test_nothing_happens_where_nothing_fails() -> None:
    with named_failures("barrier", None):
        pass


def roll_calls(timeouts_s: list[float]) -> list[float]:
    return [roll_call_s(dist.new_group(timeout=timedelta(seconds=timeout_s))) for timeout_s in timeouts_s]


def test_ranks_that_were_given_long_have_long_to_say_that_they_have_failed(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(1, roll_calls, [5.0, 120.0, 1800.0]) == [[1.0, 2.0, 10.0]]


class Notes:
    """Rank 1 says that it has failed when the roll call is over.

    Args:
        others: that say so at once.
        lost: for want of whom rank 1 has failed, as it says at last; None: it waits for others to say so.
    """

    def __init__(self, others: set[int], lost: list[int] | None) -> None:
        self._others, self._lost = others, lost
        self._times_asked = 0

    def say_here(self, rank: int) -> None:
        pass

    def say(self, rank: int, lost: list[int]) -> None:
        pass

    def is_here(self, rank: int) -> bool:
        return rank in self._others or (rank == 1 and self._times_asked > 0)

    def said(self, rank: int) -> list[int] | None:
        self._times_asked += rank == 1
        return self._lost if rank == 1 and self._times_asked > 5 else None


class Clock:
    """Time goes on while somebody sleeps, and at no other time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Thread:
    """Does all of it when it is waited for, which takes no longer than that by the clock."""

    def __init__(self, clock: Clock, target: Callable[[], None]) -> None:
        self._clock, self._target = clock, target

    def start(self) -> None:
        pass

    def join(self, limit_s: float) -> None:
        until = self._clock.now + limit_s
        self._target()
        assert self._clock.now <= until, "it would have been given up"


def lost_behind_a_roll_call(others: set[int], of_the_late: list[int] | None) -> object:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lost, "time", clock)
        patch.setattr(lost, "Thread", lambda target, daemon: Thread(clock, target))
        patch.setattr(lost, "_Notes", lambda group: Notes(others, of_the_late))
        patch.setattr(lost, "_LIMIT_S", 0.0)  # besides what it waits for
        group = dist.new_group(timeout=timedelta(minutes=2))
        return lost.name_lost(group, [None], "Timed out waiting 120000ms")


# Whom rank 0 names: who comes late says for want of whom it has failed, or waits for others to say that, of whom one does not come at all.
LATE = {"says": ({2, 3}, [2], [2]), "waits": ({2}, None, [3])}


@pytest.mark.parametrize(("others", "of_the_late", "expected"), LATE.values(), ids=LATE)
def test_who_comes_just_behind_a_roll_call_is_not_lost(
    run_on_ranks: RunOnRanks, others: set[int], of_the_late: list[int] | None, expected: list[int]
) -> None:
    assert run_on_ranks(4, lost_behind_a_roll_call, others, of_the_late)[0] == expected
