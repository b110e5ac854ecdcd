"""What is trained follows `param_groups`: what comes is taken in, what goes keeps all that it has, and a mistake changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lone import WIDTH, Lone
from torch import nn

from zeroopt.errors import ConfigError, StateError
from zeroopt.features.growth import Growth

STAGES = (0, 1, 2)


class Scene(Lone):
    """With two param_groups, and with the last layer frozen."""

    def __init__(self, stage: int = 1) -> None:
        def make(params: Any, lr: float) -> torch.optim.Optimizer:
            *others, weight, bias = params
            frozen = [param.requires_grad_(False) for param in (weight, bias)]
            return torch.optim.SGD([{"params": others}, {"params": frozen, "lr": 0.125}], lr=lr, momentum=0.5)

        super().__init__(stage, make)

    @property
    def growth(self) -> Growth:
        return self.optimizer._growth

    def names(self) -> list[str]:
        return [managed.name for managed in self.optimizer._trained.params]

    def in_buckets(self) -> set[str]:
        return {managed.name for bucket in self.replica.buckets for managed in bucket.params}

    def take_out(self, param: nn.Parameter) -> None:
        group = self.optimizer.param_groups[0]
        group["params"] = [other for other in group["params"] if other is not param]


FIRST = ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
LAST = ["3.weight", "3.bias"]


@pytest.mark.parametrize("stage", STAGES)
def test_as_long_as_nothing_changes_nothing_is_done(stage: int) -> None:
    scene = Scene(stage)
    buckets = list(scene.replica.buckets)
    scene.growth.follow_groups(unfrozen=True)
    scene.optimizer.param_groups[0]["lr"] = 0.25
    scene.growth.follow_groups()
    assert scene.names() == FIRST and scene.replica.buckets == buckets


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_unfrozen_is_taken_in_when_it_is_asked_for(stage: int) -> None:
    scene = Scene(stage)
    scene.net[3].requires_grad_(True)
    scene.growth.follow_groups()
    assert scene.names() == FIRST
    scene.growth.follow_groups(unfrozen=True)
    assert scene.names() == FIRST + LAST and scene.in_buckets() == {*FIRST, *LAST}
    taken = scene.optimizer._trained.params[6:]
    assert [(m.index, m.group, m.position) for m in taken] == [(6, 1, 6), (7, 1, 7)]
    before = scene.net[3].bias.detach().clone()
    scene.step()
    assert not torch.equal(scene.net[3].bias, before)


def test_the_rate_is_that_of_its_group() -> None:
    scene = Scene()
    scene.net[3].requires_grad_(True)
    scene.growth.follow_groups(unfrozen=True)
    before = scene.net[3].bias.detach().clone()
    scene.backward()
    grad = scene.optimizer.full_grad(scene.net[3].bias)
    assert grad is not None
    scene.optimizer.step()
    torch.testing.assert_close(scene.net[3].bias.detach(), before - 0.125 * grad)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_taken_out_keeps_its_value_gradient_and_state(stage: int) -> None:
    scene = Scene(stage)
    scene.step()
    scene.backward(1)
    bias = scene.net[1].bias
    value, grad = bias.detach().clone(), scene.optimizer.full_grad(bias)
    moments = moments_of(scene)
    buckets = {id(bucket) for bucket in scene.replica.buckets}
    scene.take_out(bias)
    scene.growth.follow_groups()
    assert scene.names() == [name for name in FIRST if name != "1.bias"] and "1.bias" not in scene.in_buckets()
    assert {id(bucket) for bucket in scene.replica.buckets} <= buckets
    assert torch.equal(bias, value) and grad is not None and bias.grad is not None and torch.equal(bias.grad, grad)
    assert scene.optimizer._inner.state[bias]["momentum_buffer"].tolist() == moments.pop("1.bias")
    assert moments_of(scene) == moments
    scene.optimizer.step()
    assert torch.equal(bias, value)


def moments_of(scene: Scene) -> dict[str, list[Any]]:
    """Moments of what is trained, by the name of the parameter."""
    state = scene.whole_state()
    return {m.name: state[m.position]["momentum_buffer"].tolist() for m in scene.optimizer._trained.params}


def test_what_moves_to_another_group_stays_in_its_bucket() -> None:
    scene = Scene()
    scene.step()
    buckets = list(scene.replica.buckets)
    bias = scene.net[0].bias
    scene.take_out(bias)
    scene.optimizer.param_groups[1]["params"].insert(0, bias)
    scene.growth.follow_groups()
    moved = next(managed for managed in scene.optimizer._trained.params if managed.param is bias)
    assert (moved.group, moved.position) == (1, 5) and scene.replica.buckets == buckets
    assert scene.names() == FIRST


def test_what_changes_is_told_to_those_who_count_on_it() -> None:
    scene = Scene()
    told: list[list[str]] = []
    scene.growth._changed = lambda: told.append(scene.names())
    scene.take_out(scene.net[0].bias)
    scene.optimizer.param_groups[1]["params"].insert(0, scene.net[0].bias)
    scene.growth.follow_groups()
    assert told == []
    scene.net[3].requires_grad_(True)
    scene.growth.follow_groups(unfrozen=True)
    scene.take_out(scene.net[0].weight)
    scene.growth.follow_groups()
    assert told == [FIRST + LAST, (FIRST + LAST)[1:]]


def test_a_gradient_of_a_frozen_parameter_is_named() -> None:
    scene = Scene()
    scene.growth.check_frozen()
    scene.net[3].bias.grad = torch.zeros(WIDTH)
    with pytest.raises(StateError, match=r"parameter '3\.bias' was frozen and has got a gradient of this rank alone"):
        scene.growth.check_frozen()
    scene.net[3].bias.grad = None
    scene.net[3].requires_grad_(True)
    scene.growth.follow_groups(unfrozen=True)
    scene.backward()
    scene.growth.check_frozen()


@pytest.mark.parametrize("mistake", ["foreign", "twice", "nothing left"])
def test_what_cannot_be_trained_changes_nothing(mistake: str) -> None:
    scene = Scene()
    scene.step()
    buckets, groups = list(scene.replica.buckets), scene.optimizer.param_groups
    params = list(groups[0]["params"])
    if mistake == "foreign":
        groups[0]["params"] = [*params[1:], nn.Parameter(torch.zeros(3))]
    elif mistake == "twice":
        groups[0]["params"] = [*params[1:], params[1]]
    else:
        groups[0]["params"] = []
    for _ in range(2):
        with pytest.raises(ConfigError):
            scene.growth.follow_groups()
    assert scene.names() == FIRST and scene.replica.buckets == buckets
    groups[0]["params"] = params
    scene.growth.follow_groups()
    scene.step(1)


def test_a_problem_of_this_rank_is_raised_as_it_is() -> None:
    scene = Scene()
    problem = KeyError("of this rank")
    with pytest.raises(KeyError) as raised:
        scene.growth.take_up_groups(problem)
    assert raised.value is problem


def test_within_join_nothing_is_taken_up() -> None:
    scene = Scene()
    scene.net[3].requires_grad_(True)
    with (
        scene.model.join(),
        pytest.raises(StateError, match=r"taking up param_groups cannot be called within join\(\)"),
    ):
        scene.growth.follow_groups(unfrozen=True)
    assert scene.names() == FIRST
