"""That a CUDA graph was captured is seen wherever the model is used, and remembered."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lone import Lone
from torch import nn

import zeroopt
from zeroopt.errors import StateError
from zeroopt.features import captures
from zeroopt.features.captures import Captures

DEVICE = torch.device("cuda:1")
STEP: Any = Mock(buckets=[Mock(index=0)])


class Capturing:
    """Stands for what torch says of the current stream of a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = False
        self.asked: list[torch.device] = []
        monkeypatch.setattr(captures, "capture_number", self._ask)

    def _ask(self, device: torch.device) -> int:
        self.asked.append(device)
        return int(self.now)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Capturing:
    return Capturing(monkeypatch)


@pytest.mark.parametrize("event", ["look", "backward_begins", "before_step"])
def test_it_is_seen_in_every_phase_and_not_forgotten(capturing: Capturing, event: str) -> None:
    found = Captures(DEVICE, Mock())
    args: tuple[Any, ...] = (STEP,) if event == "before_step" else ()
    getattr(found, event)(*args)
    assert not found.exist and capturing.asked == [DEVICE]
    found.check_may_leave()
    capturing.now = True
    getattr(found, event)(*args)
    capturing.now = False
    getattr(found, event)(*args)
    assert found.exist
    with pytest.raises(StateError, match="a CUDA graph of this model has been captured"):
        found.check_may_leave()


def test_the_cpu_has_no_graphs(capturing: Capturing) -> None:
    lone = Lone()
    lone.step()
    assert lone.model.features.captures is None and not capturing.asked


def test_parameters_that_a_graph_reads_cannot_leave_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wrapped, optimizer = zeroopt.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = Captures(torch.device("cpu"), Mock())
    monkeypatch.setattr(optimizer._growth, "_captures", found)
    found.exist = True
    kept = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = kept[:2]
    with pytest.raises(StateError, match="parameters cannot leave the param_groups"):
        wrapped(torch.ones(1, 2))
    optimizer.param_groups[0]["params"] = kept
    wrapped(torch.ones(1, 2)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("is_captured", [False, True])
def test_a_step_belongs_into_the_graph_of_its_backward(capturing: Capturing, is_captured: bool) -> None:
    found = Captures(DEVICE, Mock())
    capturing.now = is_captured
    found.backward_begins()
    found.before_step(STEP)
    assert not found.hold_steps, "it may fail yet"
    found.after_step(STEP)
    assert found.hold_steps is is_captured
    capturing.now = not is_captured
    with pytest.raises(StateError, match="is captured in" if capturing.now else "was captured in"):
        found.before_step(STEP)
    found.gradients_cleared(None)
    found.backward_begins()
    found.before_step(STEP)


def test_each_optimizer_clears_its_own_gradients(capturing: Capturing) -> None:
    found = Captures(DEVICE, Mock())
    found.backward_begins()
    found.gradients_cleared(STEP.buckets)
    capturing.now = True
    found.before_step(STEP)
    with pytest.raises(StateError, match="a backward whose gradients it takes is not"):
        found.before_step(Mock(buckets=[Mock(index=1)]))


@pytest.mark.parametrize("is_captured", [False, True])
def test_what_no_sync_has_left_belongs_to_the_graph_that_it_came_in(capturing: Capturing, is_captured: bool) -> None:
    found = Captures(DEVICE, Mock())
    capturing.now = is_captured
    found.local_backward_runs()
    capturing.now = True
    found.backward_begins()
    if is_captured:
        found.before_step(STEP)
    else:
        with pytest.raises(StateError, match="a backward whose gradients it takes is not"):
            found.before_step(STEP)


def test_state_that_a_graph_steps_by_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    lone = Lone()
    lone.step()
    found = Captures(torch.device("cpu"), Mock())
    monkeypatch.setattr(lone.optimizer, "_captures", found)
    state = lone.optimizer.state_dict()
    found.exist = True
    lone.optimizer.load_state_dict(state)
    found.hold_steps = True
    with pytest.raises(StateError, match=r"load_state_dict\(\) would replace the optimizer's state"):
        lone.optimizer.load_state_dict(state)
