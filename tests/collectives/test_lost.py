"""Failures name the rank that is lost. `test_control.py` and `tests/training/test_faults.py` have what becomes of it on ranks."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist
from worker_pool import RunOnRanks

from zeroopt import CollectiveError, StateError
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
