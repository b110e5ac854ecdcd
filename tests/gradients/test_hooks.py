"""Hooks of the user's that change gradients, registered before wrapping and after it, do what they do under DDP."""

from __future__ import annotations

import time

import pytest
import torch
from follow import STEPS, WIDTH, Prepare, follow, inputs, layers, sgd, values, with_ddp
from torch import Tensor, nn
from training import loss_of
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.gradients.counting import Arrivals
from zeroopt.gradients.hooks import GradientHook, is_taken_up


def mask(param: Tensor) -> None:
    """What keeps a pruned model pruned. Slow, so that a bucket that did not wait would be gone."""
    time.sleep(0.005)
    assert param.grad is not None
    param.grad.mul_((param > 0).float())


def replace(param: Tensor) -> None:
    assert param.grad is not None
    param.grad = param.grad.clamp(-0.01, 0.01)


def clear(param: Tensor) -> None:
    param.grad = None


def train_with_later_hooks(prepare: Prepare) -> list[Tensor]:
    """Hooks of all kinds come and go, before wrapping, before a forward, and between forward and backward."""
    net, seen = layers(4), []

    def see(param: Tensor) -> None:
        assert param.grad is not None
        seen.append(param.grad.clone())

    net[0].weight.register_post_accumulate_grad_hook(mask)
    net[0].bias.register_hook(lambda grad: grad * 2)
    model, optimizer = prepare(net, sgd(net))
    handles = [net[i].weight.register_post_accumulate_grad_hook(mask) for i in (0, 3)]
    net[1].bias.register_hook(lambda grad: grad.clamp(max=0.01))
    for step in range(STEPS):
        loss = loss_of(model(inputs(step, 4, WIDTH)))
        if step == 1:
            handles.pop().remove()
            net[2].weight.register_post_accumulate_grad_hook(replace)
            net[3].bias.register_post_accumulate_grad_hook(see)
            net[3].bias.register_post_accumulate_grad_hook(mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == STEPS - 1
    return [*values(net), *seen]


def follow_later_hooks() -> None:
    for options in ({}, {"bucket_mb": 25.0}):
        follow(train_with_later_hooks, with_ddp(), **options)


@pytest.mark.parametrize("world_size", [2, 3])
def test_later_hooks_follow_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, follow_later_hooks)


def accumulate_in_stage_0(prepare: Prepare) -> list[Tensor]:
    """A later hook changes what several backward passes have summed so far."""
    net = layers()
    model, optimizer = prepare(net, sgd(net))
    net[1].weight.register_post_accumulate_grad_hook(mask)
    for step in range(STEPS):
        for micro in range(2):
            loss_of(model(inputs(10 * step + micro, 4, WIDTH))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(net)


def follow_accumulation() -> list[bool]:
    expected = accumulate_in_stage_0(with_ddp())
    got = accumulate_in_stage_0(lambda net, opt: zeroopt.wrap(net, opt, stage=0, bucket_mb=0.001, fused=False))
    return [torch.equal(a, b) for a, b in zip(expected, got, strict=True)]


def test_later_hooks_and_accumulation(run_on_ranks: RunOnRanks) -> None:
    assert all(map(all, run_on_ranks(2, follow_accumulation)))


def train_without_a_layer(prepare: Prepare) -> list[Tensor]:
    """A hook that clears a gradient: the parameter counts as unused on this rank."""
    net = layers()
    model, optimizer = prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5))
    if net[1].weight.requires_grad:
        net[1].weight.register_post_accumulate_grad_hook(clear)
    for step in range(STEPS):
        loss_of(model(inputs(step, 4, WIDTH))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(net)


def frozen_by_hand(net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """DDP cannot do without a gradient that it expects."""
    net[1].weight.requires_grad_(False)
    return with_ddp()(net, optimizer)


def clear_in_hooks() -> list[list[Tensor]]:
    zero = train_without_a_layer(frozen_by_hand)
    return [
        zero,
        *(
            train_without_a_layer(lambda n, o, s=stage: zeroopt.wrap(n, o, stage=s, bucket_mb=0.001, fused=False))
            for stage in (0, 1, 2)
        ),
    ]


def test_a_hook_that_clears_a_gradient(run_on_ranks: RunOnRanks) -> None:
    for expected, *stages in run_on_ranks(2, clear_in_hooks):
        for got in stages:
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def edit_another(stage: int) -> str:
    """A hook that changes the gradient of a parameter that has come before."""
    net = layers()
    model, _ = zeroopt.wrap(net, sgd(net), stage=stage)

    def edit(_: Tensor) -> None:
        net[2].weight.grad.add_(torch.ones(WIDTH, WIDTH))

    net[0].weight.register_post_accumulate_grad_hook(edit)
    try:
        loss_of(model(inputs(0, 4, WIDTH))).backward()
    except zeroopt.StateError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("stage", [0, 2])
def test_what_is_changed_too_late_is_refused(run_on_ranks: RunOnRanks, stage: int) -> None:
    for message in run_on_ranks(2, edit_another, stage):
        assert message.startswith(
            "the gradient of '2.weight' was changed while backward ran, after it had been taken up"
        )


def test_the_hook_goes_to_the_end_once() -> None:
    class Taker:
        def __init__(self) -> None:
            self.at_once: list[int] = []
            self.later: list[int] = []

        def take_up(self, index: int) -> None:
            self.at_once.append(index)

        def take_up_later(self, index: int) -> None:
            self.later.append(index)

        def complete(self, bucket: int) -> None:
            raise AssertionError("nothing is counted")

    taker, param = Taker(), nn.Parameter(torch.ones(3))
    hook = GradientHook(taker, Arrivals(), param, 7)
    param.sum().backward()
    param.register_post_accumulate_grad_hook(lambda _: None)
    for _ in range(3):
        param.sum().backward()
    assert taker.at_once == [7] * 3 and taker.later == [7] and is_taken_up(param)
    del taker
    assert hook.is_idle and not is_taken_up(param)
    param.sum().backward()
    GradientHook(Taker(), Arrivals(), param, 0)  # takes idle ones off
    assert len(param._post_accumulate_grad_hooks) == 2
    hook.remove()
