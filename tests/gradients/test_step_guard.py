"""After a step that was broken off, nothing goes on but what has been loaded anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lone import LAYERS, Lone

from zeroopt import CollectiveError, NonFiniteError, RankMismatchError, StateError
from zeroopt.gradients.step_guard import StepGuard

MESSAGE = r"a step did not come to its end \({}\): .*Load a checkpoint on all ranks"


def break_off(lone: Lone, error: BaseException, *, after: int = 1) -> None:
    """Let a step raise when so many buckets have been stepped."""
    step = lone.optimizer._trained.stepper.step

    def broken(active: Any) -> Iterator[Any]:
        for number, bucket in enumerate(step(active)):
            if number == after:
                raise error
            yield bucket

    lone.backward(7)
    with patch.object(lone.optimizer._trained.stepper, "step", broken), pytest.raises(type(error)):
        lone.optimizer.step()


ERRORS = [KeyboardInterrupt(), SystemExit(1), torch.OutOfMemoryError("16 GiB"), CollectiveError("for want of rank 1")]
AFTERWARDS: dict[str, Callable[[Lone], Any]] = {
    "step": lambda lone: lone.optimizer.step(),
    "backward": lambda lone: lone.backward(),
    "state_dict": lambda lone: lone.optimizer.state_dict(),
    "consolidate_state_dict": lambda lone: lone.optimizer.consolidate_state_dict(),
    "clip_grad_norm_": lambda lone: lone.optimizer.clip_grad_norm_(1.0),
    "save": lambda lone: lone.optimizer.check_can_save(lone.replica.group),
}


@pytest.mark.parametrize("afterwards", AFTERWARDS)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_step_that_was_broken_off_is_not_repeated(error: BaseException, afterwards: str) -> None:
    lone = Lone()
    assert len(lone.replica.buckets) == LAYERS
    lone.step()
    break_off(lone, error)
    reason = type(error).__name__ if not str(error) else f"{type(error).__name__}: {error}"
    for _ in range(2):
        with pytest.raises(StateError, match=MESSAGE.format(reason)):
            AFTERWARDS[afterwards](lone)


@pytest.mark.parametrize("stage", [0, 2])
def test_what_was_loaded_goes_on(stage: int) -> None:
    """As if nothing had been: parameters and state are those before the step."""
    lone, undisturbed = (Lone(stage, torch.optim.Adam) for _ in range(2))
    for each in (lone, undisturbed):
        each.step(1)
    saved = copy.deepcopy((lone.model.state_dict(), lone.optimizer.state_dict()))
    break_off(lone, KeyboardInterrupt())
    lone.model.load_state_dict(saved[0])
    lone.optimizer.load_state_dict(saved[1])
    lone.optimizer.zero_grad()
    for each in (lone, undisturbed):
        each.step(2)
    for got, expected in zip(lone.net.parameters(), undisturbed.net.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_of_several_optimizers_each_has_to_be_loaded() -> None:
    guard = StepGuard()
    for number in range(2):
        with pytest.raises(KeyboardInterrupt), guard.changing(number, torch.device("cpu")):
            raise KeyboardInterrupt
    guard.forget(0)
    with pytest.raises(StateError):
        guard.check()
    guard.forget(1)
    guard.check()


@pytest.mark.parametrize("error", [NonFiniteError("rank 1"), RankMismatchError("rank 1")])
def test_what_all_ranks_are_told_breaks_nothing_off(error: Exception) -> None:
    guard = StepGuard()
    with pytest.raises(type(error)), guard.changing(0, torch.device("cpu")):
        raise error
    assert not guard.is_broken


def test_what_is_raised_before_parameters_change_can_be_repeated() -> None:
    lone = Lone()
    lone.backward()
    with patch.object(lone.replica.reducer, "finish", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        lone.optimizer.step()
    lone.optimizer.step()
