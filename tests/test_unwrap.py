"""`zeroopt.unwrap` gives back what plain torch can go on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from follow import inputs, layers, sgd, values
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from worker_pool import RunOnRanks

import zeroopt

WIDTH = 12


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    dtype = next(model.parameters()).dtype
    for number in numbers:
        model(inputs(number, 4, WIDTH).to(dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def go_on_with_ddp(options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Train wrapped, unwrap, train under DDP, and wrap again; under DDP alone for comparison."""
    net = layers()
    plain = DistributedDataParallel(net)
    optimizer = sgd(net)
    steps(plain, optimizer, range(9))
    expected = values(net)

    net = layers()
    params = list(net.parameters())
    optimizer = sgd(net)
    groups, group = optimizer.param_groups, optimizer.param_groups[0]
    model, wrapped = zeroopt.wrap(net, optimizer, fused=False, bucket_mb=0.001, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(wrapped, lambda _: 1.0)
    model, again = zeroopt.unwrap(model, wrapped)  # before the first step
    assert model is net and again is optimizer
    model, wrapped = zeroopt.wrap(net, optimizer, fused=False, bucket_mb=0.001, **options)
    steps(model, wrapped, range(3))
    back, again = zeroopt.unwrap(model, wrapped)
    assert back is net and again is optimizer and again.param_groups is groups and groups[0] is group
    assert all(a is b for a, b in zip(net.parameters(), params, strict=True))
    assert all(p.dtype is torch.float32 and p.storage_offset() == 0 for p in params)
    assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in params)
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert not any(param._post_accumulate_grad_hooks for param in params)
    assert set(optimizer.state) == set(params)
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in params)
    for use in (
        lambda: model(inputs(0, 4, WIDTH)),
        wrapped.step,
        wrapped.zero_grad,
        wrapped.state_dict,
        model.state_dict,
    ):
        with pytest.raises(zeroopt.StateError, match="unwrap"):
            use()
    scheduler.step()
    steps(DistributedDataParallel(net), optimizer, range(3, 6))
    model, wrapped = zeroopt.wrap(net, optimizer, fused=False, **options)
    steps(model, wrapped, range(6, 9))
    plain = zeroopt.unwrap(model)
    with pytest.raises(zeroopt.StateError, match=r"zeroopt\.unwrap has undone that"):
        wrapped.step()  # whose state was given up
    return expected, values(plain)


@pytest.mark.parametrize("options", [{"stage": 0}, {"stage": 2}, {"stage": 2, "share_parameters": True}], ids=str)
def test_training_goes_on_as_if_nothing_had_been(run_on_ranks: RunOnRanks, options: dict[str, Any]) -> None:
    for expected, got in run_on_ranks(2, go_on_with_ddp, options):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def exact_values(weights: str) -> None:
    net = layers()
    model, optimizer = zeroopt.wrap(
        net, torch.optim.AdamW(net.parameters(), lr=0.01), param_dtype=torch.bfloat16, master_weights=weights
    )
    steps(model, optimizer, range(2))
    exact = [optimizer.full_parameter(param) for param in net.parameters()]
    _, plain = zeroopt.unwrap(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(exact, net.parameters(), strict=True))
    assert all(plain.state[param]["exp_avg"].shape == param.shape for param in net.parameters())
    steps(net, plain, range(1))


@pytest.mark.parametrize("weights", ["float32", "remainder"])
def test_parameters_have_their_exact_values_again(run_on_ranks: RunOnRanks, weights: str) -> None:
    run_on_ranks(2, exact_values, weights)


def several() -> None:
    net = layers(2)
    model, first = zeroopt.wrap(net, torch.optim.AdamW(net[0].parameters(), lr=0.01))
    model, second = zeroopt.wrap(model, torch.optim.SGD(net[1].parameters(), lr=0.01, momentum=0.9))
    model(inputs(0, 4, WIDTH)).mean().backward()
    first.step()
    second.step()
    with pytest.raises(zeroopt.ConfigError, match="all 2 optimizers"):
        zeroopt.unwrap(model, first)
    _, (plain_second, plain_first) = zeroopt.unwrap(model, [second, first])
    assert set(plain_first.state) == set(net[0].parameters())
    assert set(plain_second.state) == set(net[1].parameters())


def test_all_optimizers_of_a_model(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, several)
