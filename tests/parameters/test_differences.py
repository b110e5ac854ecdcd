"""Parameters that travel as differences in codes: the same bits on all ranks, and the exact values never far away."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import batch, build, loss_of, optimizer_for, snapshot
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint
from zeroopt.errors import ZeroOptError

SMALL = {"bucket_mb": 0.01}
LEVELS = {"int8": 127, "int4": 7}
LR = 0.25


class Pulled(nn.Module):
    """Its gradient is always the same, and so is every exact step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(37, 29))
        self.bias = nn.Parameter(torch.randn(1001))

    def forward(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        pulls = [torch.randn(param.shape, generator=generator) for param in self.parameters()]
        return sum(
            ((param * pull).sum() for param, pull in zip(self.parameters(), pulls, strict=True)), torch.zeros(())
        )


def pulled() -> Pulled:
    torch.manual_seed(0)
    return Pulled()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model().backward()
    optimizer.step()
    optimizer.zero_grad()


def pull(codes: str, steps: int, options: dict[str, Any]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """What the model has and what is exact, after each step."""
    net = pulled()
    inner = torch.optim.SGD(net.parameters(), lr=LR)
    model, optimizer = zeroopt.wrap(net, inner, parameter_compression=codes, **SMALL, **options)
    history = []
    for _ in range(steps):
        step(model, optimizer)
        history.append((snapshot(model), [optimizer.full_parameter(param).clone() for param in net.parameters()]))
    return history


OPTIONS = [
    {"stage": 1},
    {"stage": 2, "fused": False},
    {"stage": 2, "transport": "pairwise", "overlap": False},
    {"stage": 2, "transport": "torch", "step_in_backward": True},
]


@pytest.mark.parametrize("codes", LEVELS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(f"{k}={v}" for k, v in options.items()))
def test_exact_values_are_those_of_plain_steps_and_the_model_stays_within_a_code_of_them(
    run_on_ranks: RunOnRanks, options: dict[str, Any], codes: str
) -> None:
    of_ranks = run_on_ranks(3, pull, codes, 4, options)
    net = pulled()
    plain = torch.optim.SGD(net.parameters(), lr=LR)
    for number in range(4):
        before = snapshot(net)
        step(net, plain)
        updates = [(a - b).abs().max() for a, b in zip(snapshot(net), before, strict=True)]
        model, exact = of_ranks[0][number]
        for other_model, _ in (history[number] for history in of_ranks[1:]):
            assert all(torch.equal(a, b) for a, b in zip(model, other_model, strict=True))
        for follows, value, stepped in zip(model, exact, net.parameters(), strict=True):
            torch.testing.assert_close(value, stepped.detach(), rtol=0, atol=1e-5)  # means over three ranks are rounded
            # A difference is an update and what the one before left out, which is less than 1 / (levels - 1) of it.
            assert 0 < (follows - value).abs().max() < max(updates) / (LEVELS[codes] - 1) * 1.01


def train(name: str, steps: int, options: dict[str, Any]) -> tuple[list[float], list[Tensor]]:
    net = build(name)
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net, groups=2), **SMALL, **options)
    losses = []
    for number in range(steps):
        loss = loss_of(model(batch(name, number % 3)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("name", ["mlp", "conv", "lm"])
def test_training_follows_that_without(run_on_ranks: RunOnRanks, name: str) -> None:
    options = {"stage": 2, "parameter_compression": "int8"}
    (plain, _), *_ = run_on_ranks(2, train, name, 12, {"stage": 2})
    (coded, params), (_, others) = run_on_ranks(2, train, name, 12, options)
    assert coded != plain
    assert coded == pytest.approx(plain, rel=0.02, abs=0.01)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def save_and_go_on(path: Path, load: bool) -> list[list[Tensor]]:
    """What the model has, and exact values, after two steps more than were saved."""
    net = pulled()
    inner = torch.optim.SGD(net.parameters(), lr=LR)
    model, optimizer = zeroopt.wrap(net, inner, stage=2, parameter_compression="int8", **SMALL)
    if load:
        zeroopt.checkpoint.load(path, model, optimizer)
    else:
        for _ in range(3):
            step(model, optimizer)
        zeroopt.checkpoint.save(path, model, optimizer)
    first = snapshot(model)
    for _ in range(2):
        step(model, optimizer)
    return [first, snapshot(model), [optimizer.full_parameter(param).clone() for param in net.parameters()]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_checkpoints_hold_exact_values(run_on_ranks: RunOnRanks, tmp_path: Path, world_size: int) -> None:
    (saved, behind, went_on), _ = run_on_ranks(2, save_and_go_on, tmp_path / "checkpoint", load=False)
    of_ranks = run_on_ranks(world_size, save_and_go_on, tmp_path / "checkpoint", load=True)
    loaded, after, exact = of_ranks[0]
    if world_size == 2:  # the very same run
        assert all(torch.equal(a, b) for a, b in zip([*saved, *behind], loaded + after, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(exact, went_on, strict=True))
    else:
        assert any(not torch.equal(a, b) for a, b in zip(saved, loaded, strict=True))  # what codes had left out is in
    for other in of_ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(loaded + after, other[0] + other[1], strict=True))
    for value, expected in zip(exact, went_on, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


def go_on_from_state_dicts() -> bool:
    """Whether a load of this rank's state dicts brings exact values back, bit for bit."""
    net = pulled()
    inner = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    model, optimizer = zeroopt.wrap(net, inner, stage=2, parameter_compression="int8", **SMALL)
    step(model, optimizer)
    step(model, optimizer)
    kept = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    exact = [optimizer.full_parameter(param).clone() for param in net.parameters()]
    step(model, optimizer)
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    return all(
        torch.equal(optimizer.full_parameter(param), value)
        for param, value in zip(net.parameters(), exact, strict=True)
    )


def test_state_dicts_hold_exact_values(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, go_on_from_state_dicts) == [True, True]


def write_and_read() -> list[Tensor]:
    """Exact values after a write of the user's between two steps."""
    net = pulled()
    model, optimizer = zeroopt.wrap(
        net, torch.optim.SGD(net.parameters(), lr=LR), stage=2, parameter_compression="int8", **SMALL
    )
    step(model, optimizer)
    with torch.no_grad():
        net.weight.fill_(2.0)
    step(model, optimizer)
    return [optimizer.full_parameter(net.weight).clone(), snapshot(model)[0]]


def test_exact_values_follow_what_a_user_writes(run_on_ranks: RunOnRanks) -> None:
    net = pulled()
    with torch.no_grad():
        net.weight.fill_(2.0)
    step(net, torch.optim.SGD(net.parameters(), lr=LR))
    for exact, model in run_on_ranks(2, write_and_read):
        torch.testing.assert_close(exact, net.weight.detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(model, exact, rtol=0, atol=0.02)


def clipped(codes: str | None, by_option: bool) -> tuple[float, list[Tensor]]:
    """The norm of the last step's gradients, and exact values."""
    net = pulled()
    options = {"max_grad_norm": 0.5} if by_option else {}
    inner = torch.optim.AdamW(net.parameters(), lr=0.1)
    model, optimizer = zeroopt.wrap(net, inner, stage=2, parameter_compression=codes, **SMALL, **options)
    for _ in range(2):
        model().backward()
        norm = 0.0 if by_option else float(optimizer.clip_grad_norm_(0.5))
        optimizer.step()
        norm = float(optimizer.grad_norm) if by_option else norm
        optimizer.zero_grad()
    return norm, [optimizer.full_parameter(param).clone() for param in net.parameters()]


@pytest.mark.parametrize("by_option", [False, True])
def test_clipping(run_on_ranks: RunOnRanks, by_option: bool) -> None:
    """Gradients do not depend on parameters here, so exact values are those without codes."""
    (norm, exact), _ = run_on_ranks(2, clipped, "int8", by_option)
    (plain_norm, plain), _ = run_on_ranks(2, clipped, None, by_option)
    assert norm == pytest.approx(plain_norm)
    for value, expected in zip(exact, plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def with_an_infinity() -> tuple[int, int]:
    """How many elements of the model, and of the exact values, are not finite after two steps."""
    net = pulled()
    model, optimizer = zeroopt.wrap(
        net, torch.optim.SGD(net.parameters(), lr=LR), stage=2, parameter_compression="int8", **SMALL
    )
    with torch.no_grad():
        net.weight[3, 4] = -torch.inf
    for _ in range(2):
        (model.module.weight[0].sum() + model.module.bias.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    exact = optimizer.full_parameter(net.weight)
    return int((~torch.isfinite(net.weight)).sum()), int((~torch.isfinite(exact)).sum())


def test_an_infinite_parameter_stays_alone(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, with_an_infinity) == [(1, 1), (1, 1)]


def step_alone() -> None:
    net, plain = pulled(), pulled()
    model, optimizer = zeroopt.wrap(
        net, torch.optim.SGD(net.parameters(), lr=LR), stage=2, parameter_compression="int4"
    )
    step(model, optimizer)
    step(plain, torch.optim.SGD(plain.parameters(), lr=LR))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model), snapshot(plain), strict=True))
    assert not any(bucket.master.completes for bucket in model.replica.buckets)


def test_a_rank_alone_sends_nothing_and_keeps_nothing(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(1, step_alone)


def wrap_pulled(dtype: torch.dtype, options: dict[str, Any]) -> str:
    """The error."""
    net = pulled().to(dtype)
    try:
        zeroopt.wrap(
            net, torch.optim.SGD(net.parameters(), lr=LR), **{"stage": 2, "parameter_compression": "int8", **options}
        )
    except ZeroOptError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"parameter_compression": "int2"}, "ConfigError: .*parameter_compression.*int8"),
        ({"stage": 0}, "ConfigError: .*needs stage 1 or 2"),
        ({"param_dtype": torch.bfloat16}, "NotSupportedError: .*encodes differences of float32"),
        ({"share_parameters": True}, "NotSupportedError: .*share_parameters"),
        ({"average_every": 2}, "NotSupportedError: .*average_every"),
        ({"state_device": "cpu"}, "NotSupportedError: .*state_device"),
    ],
)
def test_what_does_not_go_with_it_is_refused(run_on_ranks: RunOnRanks, options: dict[str, Any], error: str) -> None:
    for told in run_on_ranks(2, wrap_pulled, torch.float32, options):
        assert re.search(error, told)


def test_other_dtypes_are_refused(run_on_ranks: RunOnRanks) -> None:
    for told in run_on_ranks(2, wrap_pulled, torch.float64, {}):
        assert re.search("expected parameters of torch.float32, got 'weight' of torch.float64", told)
