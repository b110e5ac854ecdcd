"""A model, and optimizers that need whole matrices or norms of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from training import loss_of

from zeroopt.optim import FusedLAMB


@contextmanager
def no_padding() -> Iterator[None]:
    """Within it, plans put up with no padding: whole parameters of these little models lie across slices, too, and have owners."""
    with patch.multiple("zeroopt.plan.buckets", PADDING_SHARE=0.0, PADDING_BYTES=0):
        yield


class Net(nn.Module):
    """Matrices of several shapes, vectors, a scalar, a weight in transposed memory, and a layer that some steps leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.layers = nn.ModuleList([nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 12, bias=False)])
        self.rare = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.layers[1].weight = nn.Parameter(torch.randn(24, 12).mul(0.2).t())

    def forward(self, tokens: Tensor, with_rare: bool) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers[:2]:
            x = torch.tanh(layer(x))
        if with_rare:
            x = x + self.rare(x)
        return self.layers[2](self.norm(x)) * self.scale


class Lars(torch.optim.Optimizer):
    """LARS (You et al. 2017, arXiv:1708.03888): the rate of each parameter goes by its norm and that of its gradient."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.stepped: list[list[int]] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                self.stepped.append(list(param.shape))
                trust = param.norm() / (param.grad.norm() + 1e-9)
                buffer = self.state[param].setdefault("buffer", torch.zeros_like(param))
                buffer.mul_(group["momentum"]).add_(param.grad * trust)
                param.sub_(buffer, alpha=group["lr"])


class Shampoo(torch.optim.Optimizer):
    """Shampoo (Gupta et al. 2018, arXiv:1802.09568) of matrices, with a statistic for each side that is not too long, and rates that go
    by the largest gradient so far: state of all kinds of shapes."""

    def __init__(self, params: Any, lr: float = 0.1, longest: int = 5) -> None:
        super().__init__(params, {"lr": lr})
        self._longest = longest

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(self._direction(param, param.grad), alpha=group["lr"])

    def _direction(self, param: Tensor, grad: Tensor) -> Tensor:
        state = self.state[param]
        if not state:
            sides = [torch.eye(size) if size <= self._longest else None for size in param.shape]
            state.update(step=0, moment=torch.zeros_like(param), sides=sides, norms={"largest": torch.zeros(())})
        state["step"] += 1
        state["moment"].lerp_(grad, 0.5)
        torch.maximum(state["norms"]["largest"], grad.norm(), out=state["norms"]["largest"])
        rows, columns = state["sides"]
        direction = state["moment"] / (1 + state["norms"]["largest"])
        if rows is not None:
            direction = torch.linalg.solve(rows.add_(grad @ grad.T), direction)
        if columns is not None:
            direction = torch.linalg.solve(columns.add_(grad.T @ grad), direction.T).T
        return direction


class MuonAndAdam(torch.optim.Optimizer):
    """One class for all parameters, as users write it: matrices orthogonalised, the rest stepped by Adam."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.02, "use_muon": False})
        self.stepped: list[list[int]] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.stepped.append(list(param.shape))
                    update = self._orthogonal(param) if group["use_muon"] else self._adam(param)
                    param.sub_(update, alpha=group["lr"])

    def _orthogonal(self, param: Tensor) -> Tensor:
        if param.dim() != 2:
            raise ValueError("expected a matrix")
        buffer = self.state[param].setdefault("buffer", torch.zeros_like(param))
        buffer.mul_(0.9).add_(param.grad)
        x = buffer / (buffer.norm() + 1e-7)
        for _ in range(3):
            x = 1.5 * x - 0.5 * x @ x.T @ x
        return x

    def _adam(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if not state:
            state.update(step=0, mean=torch.zeros_like(param), square=torch.zeros_like(param))
        state["step"] += 1
        state["mean"].lerp_(param.grad, 0.1)
        state["square"].mul_(0.99).addcmul_(param.grad, param.grad, value=0.01)
        return (state["mean"] / (1 - 0.9 ** state["step"])) / (
            (state["square"] / (1 - 0.99 ** state["step"])).sqrt() + 1e-8
        )


def halves(params: list[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    return [{"params": params[::2], "lr": lr}, {"params": params[1::2], "lr": 2 * lr}]


def matrices(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.dim() == 2]


def muon_and_adam(net: nn.Module) -> torch.optim.Optimizer:
    rest = [p for p in net.parameters() if p.dim() != 2]
    return MuonAndAdam([{"params": matrices(net), "use_muon": True}, {"params": rest}])


# Each with two param_groups. Muon has no room for the other parameters: nobody trains them.
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "lamb": lambda net: FusedLAMB(halves(list(net.parameters()), 0.01)),
    "lars": lambda net: Lars(halves(list(net.parameters()), 0.1)),
    "mixed": muon_and_adam,
}
if hasattr(torch.optim, "Adafactor"):
    OPTIMIZERS["adafactor"] = lambda net: torch.optim.Adafactor(halves(list(net.parameters()), 0.05))
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda net: torch.optim.Muon(halves(matrices(net), 0.01))


def build() -> Net:
    torch.manual_seed(1234)
    return Net()


def loss_for(model: nn.Module, step: int, rank: int) -> Tensor:
    """The extra layer is used by all ranks, by none, and by the first one, in turn."""
    tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(1000 * step + rank))
    return loss_of(model(tokens, step % 3 == 0 or (step % 3 == 2 and rank == 0)).float())
