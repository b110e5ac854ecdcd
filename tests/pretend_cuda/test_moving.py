"""State on a GPU goes to other ranks by way of their CPUs, and comes to lie on the GPU of the rank that has it from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt

from .process import PretendProcess

pytestmark = pytest.mark.slow

WIDTH = 8


class Backwards(nn.Module):
    """Registers its layers in the reverse of the order in which it runs them, so that buckets are planned anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        generator = torch.Generator().manual_seed(0)
        for param in self.parameters():
            nn.init.normal_(param.data, std=0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = torch.tanh(layer(x))
        return x


class Counting(torch.optim.Optimizer):
    """Momentum that counts its steps beside the parameter, as optimizers do that are captured in CUDA graphs."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    if not state:
                        state["step"] = torch.zeros((), device=param.device)
                        state["mean"] = torch.zeros_like(param)
                    state["step"] += 1
                    state["mean"].lerp_(param.grad, 0.25)
                    param.sub_(state["mean"] * (group["lr"] / state["step"]))
        return None


def _train(rank: int, device: torch.device) -> tuple[list[Tensor], set[tuple[str, str]], list[str]]:
    """A step before wrapping, and some after it: parameters, devices of the state, and names in the first bucket."""
    net = Backwards().to(device)
    inner = Counting(net.parameters())

    def backward(model: nn.Module, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        model(torch.randn(4, WIDTH, generator=generator).to(device)).square().mean().backward()

    backward(net, 0)  # the same on all ranks
    inner.step()
    inner.zero_grad()
    model, optimizer = zeroopt.wrap(net, inner, stage=1, bucket_mb=0.0003, transport="torch")
    for number in range(3):
        backward(model, 10 * rank + number)
        optimizer.step()
        optimizer.zero_grad()
    devices = {(name, str(value.device)) for entry in inner.state.values() for name, value in entry.items()}
    params = [param.detach().cpu().clone() for param in net.parameters()]
    return params, devices, [managed.name for managed in optimizer._trained.buckets[0].params]


def _train_here() -> list[tuple[list[Tensor], set[tuple[str, str]], list[str]]]:
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> tuple[list[Tensor], set[tuple[str, str]], list[str]]:
        return _train(rank.number, rank.device)

    return on_ranks(2, run)[0]


def _train_on_cpu() -> tuple[list[Tensor], set[tuple[str, str]], list[str]]:
    return _train(torch.distributed.get_rank(), torch.device("cpu"))


def test_step_counts_stay_on_the_device_of_their_rank(
    on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks
) -> None:
    expected = run_on_ranks(2, _train_on_cpu)
    for number, (params, devices, names) in enumerate(on_pretend_cuda(_train_here)):
        assert names[0].startswith("layers.0"), "planned anew"
        assert devices == {("step", f"cuda:{number}"), ("mean", f"cuda:{number}")}
        for param, other in zip(params, expected[0][0], strict=True):
            torch.testing.assert_close(param, other, rtol=0, atol=0)
