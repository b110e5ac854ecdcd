"""What a training loop does around the steps works as under DistributedDataParallel: schedulers, closures, hooks of optimizers,
profiles, averages of the weights."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from follow import STAGES, Prepare, follow, inputs, sgd, values, with_ddp, with_zeroopt
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from training import build, loss_of
from worker_pool import RunOnRanks

import zeroopt

STEPS = 8


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(7, 3)


def backward(model: nn.Module, step: int) -> Tensor:
    loss = loss_of(model(inputs(step, 4, 7)))
    loss.backward()
    return loss.detach()


# Learning rate schedulers.

Schedule = Callable[[Optimizer], Any]

SCHEDULES: dict[str, Schedule] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.2, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 2, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.3, 0.2], STEPS + 1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5, threshold=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "SWALR": lambda o: SWALR(o, 0.02, anneal_epochs=4),
}


CYCLES_BETAS_OR_MOMENTUM = ("CyclicLR", "OneCycleLR")


def adamw_or_sgd(kind: str, net: nn.Module) -> Optimizer:
    groups = [{"params": [net.weight]}, {"params": [net.bias], "lr": 0.02}]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.01, eps=1e-3)
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def scheduled(kind: str, schedule: Schedule, prepare: Prepare, *, before: bool) -> tuple[list[Any], list[Tensor]]:
    """What the scheduler makes of the groups step by step, and the parameters after all of them. It may not warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        return train_scheduled(kind, schedule, prepare, before)


def train_scheduled(kind: str, schedule: Schedule, prepare: Prepare, before: bool) -> tuple[list[Any], list[Tensor]]:
    net = small_net()
    optimizer = adamw_or_sgd(kind, net)
    scheduler = schedule(optimizer) if before else None
    model, optimizer = prepare(net, optimizer)
    scheduler = scheduler or schedule(optimizer)
    course = []
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
        optimizer.zero_grad()
        options = ("lr", "momentum", "betas")
        course.append([[group[name] for name in options if name in group] for group in optimizer.param_groups])
    return course, values(net)


def follow_schedulers() -> list[str]:
    """The cases in which rates, momenta or parameters are not DDP's."""
    unlike = []
    for number, (name, schedule) in enumerate(SCHEDULES.items()):
        for kind in ("adamw", "sgd") if name in CYCLES_BETAS_OR_MOMENTUM else ("sgd",):
            expected, expected_params = scheduled(kind, schedule, with_ddp(), before=True)
            for before in (True, False):
                own_step = with_zeroopt(stage=STAGES[number % len(STAGES)], fused=False)
                course, params = scheduled(kind, schedule, own_step, before=before)
                fused_course, _ = scheduled(kind, schedule, with_zeroopt(fused=True), before=before)
                same = all(torch.equal(a, b) for a, b in zip(expected_params, params, strict=True))
                if not (same and course == fused_course == expected):
                    unlike.append(f"{name}, {kind}, before={before}")
    return unlike


def test_every_scheduler_follows_ddp(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, follow_schedulers) == [[], []]


def test_no_scheduler_is_missing() -> None:
    known = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} <= set(SCHEDULES)


# Closures and hooks.


def train_with_closures(prepare: Prepare) -> list[Tensor]:
    """The loss that a closure returns, and a pre-hook that puts a closure in."""
    net = small_net()
    model, optimizer = prepare(net, sgd(net))
    losses = []
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            return backward(model, step)

        if step < 2:
            losses.append(optimizer.step(closure))
        else:
            hook = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((args[0], closure), {}))
            losses.append(optimizer.step())
            hook.remove()
    return [*values(net), *losses]


def follow_closures() -> None:
    follow(train_with_closures, with_ddp())


@pytest.mark.parametrize("world_size", [2, 3])
def test_closures_follow_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, follow_closures)


@contextmanager
def everywhere(pre: Callable[..., None], post: Callable[..., None]) -> Iterator[None]:
    """Hooks of all optimizers."""
    handles = register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_hooks(place: str, prepare: Prepare) -> list[tuple[str, bool]]:
    """Hooks in the order in which they ran in one step, and whether the parameters had been stepped then."""
    net = small_net()
    optimizer = sgd(net)
    calls: list[tuple[str, bool]] = []
    before = values(net)

    def note(when: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls.append((when, not torch.equal(before[0], values(net)[0])))

        return hook

    def register(on: Optimizer) -> None:
        on.register_step_pre_hook(note("pre"))
        on.register_step_post_hook(note("post"))

    if place == "wrapped, before":
        register(optimizer)
    model, returned = prepare(net, optimizer)
    if place in ("wrapped, after", "returned"):
        register(returned if place == "returned" else optimizer)
    backward(model, 0)
    if place == "global":
        with everywhere(note("pre"), note("post")):
            returned.step()
    else:
        returned.step()
    return calls


def hooks_in_every_stage(place: str) -> list[list[tuple[str, bool]]]:
    variants = [with_zeroopt(stage=stage, fused=fused) for stage in STAGES for fused in (False, True)]
    return [count_hooks(place, prepare) for prepare in (with_ddp(), *variants)]


@pytest.mark.parametrize(
    "place",
    [
        "wrapped, before",
        "returned",
        "wrapped, after",
        "global",
    ],
)
def test_step_hooks_run_once(run_on_ranks: RunOnRanks, place: str) -> None:
    for counts in run_on_ranks(2, hooks_in_every_stage, place):
        assert counts == [[("pre", False), ("post", True)]] * len(counts)


def global_hooks_while_wrapping() -> int:
    calls: list[object] = []
    net = small_net()
    with everywhere(lambda *_: calls.append(1), lambda *_: calls.append(1)):
        zeroopt.wrap(net, sgd(net))
    return len(calls)


def test_wrapping_runs_no_global_hooks(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, global_hooks_while_wrapping) == [0, 0]


def ranges_of_a_step(stage: int, fused: bool) -> dict[str, int]:
    """Names of the optimizer's ranges in a profile of two steps, and how often each is there."""
    net = small_net()
    model, optimizer = zeroopt.wrap(net, sgd(net), stage=stage, fused=fused)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for step in range(2):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    counts = Counter(event.name for event in profile.events())
    return {name: count for name, count in counts.items() if name.startswith("Optimizer.")}


def ranges_in_every_stage(fused: bool) -> list[dict[str, int]]:
    return [ranges_of_a_step(stage, fused) for stage in STAGES]


@pytest.mark.parametrize("fused", [True, False])
def test_profiles_name_step_and_zero_grad(run_on_ranks: RunOnRanks, fused: bool) -> None:
    expected = {"Optimizer.step#ZeroOptimizer.step": 2, "Optimizer.zero_grad#ZeroOptimizer.zero_grad": 2}
    for ranges in run_on_ranks(2, ranges_in_every_stage, fused):
        assert ranges == [expected] * len(STAGES)


# Averages of the weights.


def train_with_averages(prepare: Prepare) -> list[Tensor]:
    """Averages of the wrapped model: exponential, of buffers too, and equal with a rate and batch norm statistics of its own."""
    net = build("conv")
    model, optimizer = prepare(net, sgd(net))
    smooth = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    with_buffers = AveragedModel(model, avg_fn=lambda mean, value, _: (mean + value) / 2, use_buffers=True)
    equal = AveragedModel(model)
    scheduler = SWALR(optimizer, 0.02, anneal_epochs=2)
    for step in range(4):
        loss_of(model(inputs(step, 4, 3, 8, 8))).backward()
        optimizer.step()
        optimizer.zero_grad()
        smooth.update_parameters(model)
        with_buffers.update_parameters(model)
        if step >= 2:
            equal.update_parameters(model)
            scheduler.step()
    update_bn([inputs(step, 4, 3, 8, 8) for step in range(10, 12)], equal)
    results = values(net)
    for average in (smooth, with_buffers, equal):
        results += [*values(average), *(buffer.clone() for buffer in average.module.buffers())]
        assert average.n_averaged == (2 if average is equal else 4)
    return [*results, torch.tensor(optimizer.param_groups[0]["lr"])]


def follow_averages() -> None:
    follow(train_with_averages, with_ddp())


@pytest.mark.parametrize("world_size", [2, 3])
def test_averaged_models_follow_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, follow_averages)
