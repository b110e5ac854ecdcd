"""Every way to put another tensor in the place of a gradient works as under DDP, or raises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from follow import STEPS, WIDTH, Prepare, follow, inputs, layers, sgd, values, with_ddp
from torch import Tensor, nn
from training import loss_of
from worker_pool import RunOnRanks

import zeroopt

Set = Callable[[nn.Parameter], object]


def ones_as_data(param: nn.Parameter) -> None:
    param.grad.data = torch.ones_like(param.data)  # type: ignore[union-attr]


def transposed_as_data(param: nn.Parameter) -> None:
    """In memory otherwise than the parameter."""
    shape = [*reversed(param.shape)]
    param.grad.data = (torch.arange(param.numel()).float() / 100).reshape(shape).permute(*reversed(range(param.ndim)))  # type: ignore[union-attr]


def halve_data(param: nn.Parameter) -> None:
    param.grad.data /= 2.0  # type: ignore[union-attr]


def set_twice(param: nn.Parameter) -> None:
    ones_as_data(param)
    param.grad.data *= 3.0  # type: ignore[union-attr]


def setting(change: Set) -> Callable[[Prepare], list[Tensor]]:
    def run(prepare: Prepare) -> list[Tensor]:
        net = layers()
        model, optimizer = prepare(net, sgd(net))
        for step in range(STEPS):
            loss_of(model(inputs(step, 4, WIDTH))).backward()
            for param in net.parameters():
                change(param)
            optimizer.step()
            optimizer.zero_grad()
        return values(net)

    return run


def follow_setters() -> None:
    for change in (ones_as_data, transposed_as_data, halve_data, set_twice):
        follow(setting(change), with_ddp())


def test_setters_follow_ddp(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, follow_setters)


REFUSED: dict[str, Set] = {
    "set_": lambda param: param.grad.set_(torch.ones_like(param.data)),  # type: ignore[union-attr]
    "swap_tensors": lambda param: torch.utils.swap_tensors(param.grad, torch.ones_like(param.data)),
    "all_reduce": lambda param: dist.all_reduce(param.grad),
    "all_reduce of data": lambda param: dist.all_reduce(param.grad.data),  # type: ignore[union-attr]
    "data of another shape": lambda param: setattr(param.grad, "data", torch.ones(3, 3)),
    "another sharded gradient": lambda param: setattr(param.grad, "data", OTHER[-1].grad),
    "no tensor": lambda param: setattr(param.grad, "data", None),
}
OTHER: list[nn.Parameter] = []


def try_setters() -> dict[str, str]:
    net = layers()
    model, optimizer = zeroopt.wrap(net, sgd(net), stage=2)
    OTHER.append(net[1].weight)
    messages = {}
    for name, change in REFUSED.items():
        loss_of(model(inputs(0, 4, WIDTH))).backward()
        try:
            change(net[0].weight)
            optimizer.step()
            messages[name] = "no error"
        except (zeroopt.StateError, RuntimeError) as error:
            messages[name] = str(error)
        optimizer.zero_grad()
    with pytest.raises(zeroopt.StateError, match="was cleared"):
        loss_of(model(inputs(0, 4, WIDTH))).backward()
        grad = net[0].weight.grad
        optimizer.zero_grad()
        grad.data = torch.ones(WIDTH, WIDTH)
    return messages


def test_others_are_refused(run_on_ranks: RunOnRanks) -> None:
    for messages in run_on_ranks(2, try_setters):
        assert "of a sharded gradient" in messages["set_"]
        assert "swap_tensors" in messages["swap_tensors"] or "gradient edge" in messages["swap_tensors"]
        assert messages["all_reduce"].startswith("c10d")
        assert messages["all_reduce of data"] == messages["all_reduce"]
        expected = "expected a tensor of shape [12, 12] for the gradient of '0.weight', got "
        assert messages["data of another shape"] == expected + "shape [3, 3]"
        assert messages["another sharded gradient"] == expected + "another sharded gradient"
        assert messages["no tensor"] == "expected a tensor for the gradient of '0.weight', got NoneType"
