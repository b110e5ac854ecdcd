"""Optimizers are tried out where they will step: some take CUDA tensors only, and some those on the CPU only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worker_pool import RunOnRanks

from zeroopt.plan.params import Grain
from zeroopt.probing.grains import find_grains
from zeroopt.probing.state_size import StateSize

from .process import PretendProcess
from .training import Loop, train

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


class Picky(torch.optim.Optimizer):
    """Momentum for tensors on devices of one type.

    Args:
        wanted: that type; None: any.
        whole: divide by the norm of the parameter's gradient.
        noise: draw random numbers on the parameter's device.
    """

    def __init__(self, params: Any, wanted: str | None, *, whole: bool = False, noise: float = 0.0) -> None:
        super().__init__(params, {"lr": 0.01})
        self.wanted, self.whole, self.noise = wanted, whole, noise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, group["lr"])
        return None

    def _step_one(self, param: Tensor, lr: float) -> None:
        assert param.grad is not None
        if self.wanted not in (None, param.device.type):
            raise RuntimeError(f"expected {self.wanted} tensors, got {param.device.type}")
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device)
            state["mean"] = torch.zeros_like(param)
        state["step"] += 1
        state["mean"].lerp_(param.grad / param.grad.norm() if self.whole else param.grad, 0.5)
        param.sub_(state["mean"] * lr)
        if self.noise:
            param.add_(torch.randn_like(param), alpha=self.noise)


def _params(device: str) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, device=device)) for shape in ((7,), (40, 30))]


def _find() -> dict[str, Any]:
    def grains(*args: Any, home: torch.device | None = None, **options: Any) -> list[Grain] | str:
        try:
            return find_grains(Picky(_params("cuda"), *args, **options), home=home)
        except Exception as error:  # noqa: BLE001
            return str(error)

    before = torch.cuda.get_rng_state()
    found = {
        "CUDA only": grains("cuda"),
        "CUDA only, whole": grains("cuda", whole=True),
        "CPU only": grains("cpu"),
        "CPU only, stepped there": grains("cpu", home=CPU),
        "random": grains("cuda", noise=0.1),
        "capturable": find_grains(Own(_params("cuda"), lr=0.0, capturable=True)),
        "state": StateSize(Picky(_params("cuda"), "cuda"), 0, torch.device("cuda")).of_tensor((10, 20), torch.float32),
    }
    return {**found, "generator": torch.equal(before, torch.cuda.get_rng_state())}


class Own(torch.optim.AdamW):
    """Not one of those that are known."""


def test_the_parameters_device_is_where_it_is_tried(on_pretend_cuda: PretendProcess) -> None:
    found = on_pretend_cuda(_find)
    assert found["CUDA only"] == found["CPU only, stepped there"] == found["capturable"] == [Grain.ELEMENT]
    assert found["CUDA only, whole"] == [Grain.PARAMETER]
    assert "could not step a parameter" in found["CPU only"] and "expected cpu tensors, got cuda" in found["CPU only"]
    assert "draws random numbers in its step" in found["random"]
    assert found["state"] == 4 * 200
    assert found["generator"], "random numbers go on as if none had been drawn"


def _of_cuda(params: Any) -> torch.optim.Optimizer:
    return Picky(params, "cuda")


def _of_any(params: Any) -> torch.optim.Optimizer:
    return Picky(params, None)


def _train_here() -> list[list[Tensor]]:
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> list[Tensor]:
        return train(Loop({"stage": 2}, optimizer=_of_cuda), rank.number, rank.device)

    return on_ranks(2, run)[0]


def _train_on_cpu() -> list[Tensor]:
    return train(Loop({"stage": 2}, optimizer=_of_any), torch.distributed.get_rank(), CPU)


def test_one_that_steps_cuda_tensors_only_trains(on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks) -> None:
    expected = run_on_ranks(2, _train_on_cpu)
    for params in on_pretend_cuda(_train_here):
        for param, other in zip(params, expected[0], strict=True):
            torch.testing.assert_close(param, other, rtol=0, atol=0)
