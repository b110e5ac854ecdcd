"""A model and optimizers whose state is of every kind, trained under DDP or under zeroopt, and how states are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from remembered import remembered_grains
from torch import Tensor, nn
from training import OPTIMIZERS, loss_of, prepare_all
from whole_optimizers import Lars

from zeroopt.optim import FusedLAMB

BF16 = torch.bfloat16

TIERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "master": {"param_dtype": BF16},
    "remainder": {"param_dtype": BF16, "master_weights": "remainder"},
    "none": {"param_dtype": BF16, "master_weights": "none"},
    "int8": {"state_dtype": torch.int8},
    "bfloat16": {"state_dtype": BF16},
    "int8 with remainder": {"param_dtype": BF16, "master_weights": "remainder", "state_dtype": torch.int8},
    "int8 with master": {"param_dtype": BF16, "state_dtype": torch.int8},
    "bfloat16 without master": {"param_dtype": BF16, "master_weights": "none", "state_dtype": BF16},
}


class Varied(nn.Module):
    """Memory formats, sizes that nothing divides, a scalar, and parameters that are frozen, or used late or never."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 13, 3).to(memory_format=torch.channels_last)
        self.head = nn.Linear(13, 37)
        self.head.weight = nn.Parameter(torch.randn(13, 37).mul(0.2).t())
        self.late, self.never = nn.Linear(37, 7), nn.Linear(7, 11)
        self.frozen = nn.Linear(37, 37).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, with_late: bool) -> Tensor:
        x = self.frozen(torch.tanh(self.head(torch.relu(self.conv(x)).mean(dim=(2, 3))))) * self.scale
        return self.late(x) if with_late else x


class Nested(torch.optim.Optimizer):
    """A user's own: element-wise, with state in dicts, lists and tuples, numbers and texts."""

    def __init__(self, params: Iterable[Any], lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = 0
                    state["moments"] = {"mean": torch.zeros_like(param), "square": torch.zeros_like(param)}
                    state["history"] = [param.grad.clone(), (torch.zeros_like(param), None)]
                    state["count"] = torch.tensor(0)
                    state["note"] = "text"
                    state["table"] = torch.zeros(1, 2)
                state["step"] += 1
                state["count"] += 1
                state["table"] += 1
                state["moments"]["mean"].lerp_(param.grad, 0.1)
                state["moments"]["square"].lerp_(param.grad.square(), 0.1)
                state["history"][0].copy_(param.grad)
                state["history"][1][0].sub_(param.grad)
                param.sub_(state["moments"]["mean"] / (state["moments"]["square"].sqrt() + 1e-8), alpha=group["lr"])


class WideMoments(torch.optim.Optimizer):
    """Keeps float32 state whatever the parameters are."""

    def __init__(self, params: Iterable[Any], lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                mean = state.setdefault("mean", torch.zeros_like(param, dtype=torch.float32))
                mean.lerp_(param.grad.float(), 0.1)
                param.sub_((mean * group["lr"]).to(param.dtype))


def halves(factory: Callable[[Any], torch.optim.Optimizer]) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Two param_groups with learning rates of their own."""

    def make(net: nn.Module) -> torch.optim.Optimizer:
        params = list(net.parameters())
        optimizer = factory([{"params": params[:3]}, {"params": params[3:]}])
        optimizer.param_groups[1]["lr"] *= 2
        return optimizer

    return make


MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    **{name: halves(OPTIMIZERS[name]) for name in OPTIMIZERS if name != "own"},
    "asgd": halves(torch.optim.ASGD),
    "nested": halves(Nested),
    "lars": halves(Lars),
    "lamb": halves(FusedLAMB),
}
if hasattr(torch.optim, "Adafactor"):
    MAKERS["adafactor"] = halves(torch.optim.Adafactor)
if hasattr(torch.optim, "Muon"):
    MAKERS["muon"] = lambda net: torch.optim.Muon([p for p in net.parameters() if p.dim() == 2])


class Run:
    """A model that trains under zeroopt's options, or under DDP for None."""

    def __init__(self, name: str, options: dict[str, Any] | None, *, unused: bool = True) -> None:
        torch.manual_seed(1234)
        self.net = Varied()
        self.net.never.requires_grad_(unused)
        self.optimizer: Any
        if options is not None and "param_dtype" in options:
            self.net.frozen.to(options["param_dtype"])
            self.net.never.to(None if unused else options["param_dtype"])
        with remembered_grains("Varied", name, unused, (options or {}).get("param_dtype")):
            self.model, (self.optimizer,) = prepare_all(self.net, [MAKERS[name](self.net)], options)
        self.step = 0

    def train(self, steps: int, late_from: int = 2, same: bool = False) -> None:
        """Some more steps. From step `late_from` on, all parameters but one are used.

        Args:
            same: give all ranks the same data, so that their number does not matter.
        """
        for _ in range(steps):
            seed = 1000 * self.step + (0 if same else dist.get_rank())
            x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
            x = x.to(self.net.conv.weight.dtype)
            loss_of(self.model(x, self.step >= late_from).float()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1

    def params(self) -> list[Tensor]:
        """Copies of all parameters."""
        return [param.detach().clone() for param in self.net.parameters()]


def whole_state(optimizer: Any, to: int = 0) -> dict[str, Any]:
    """The whole state on all ranks."""
    optimizer.consolidate_state_dict(to)
    everyone = [optimizer.full_state_dict() if dist.get_rank() == to else None]
    dist.broadcast_object_list(everyone, to)
    assert everyone[0] is not None
    return everyone[0]


def all_shards(optimizer: Any) -> list[dict[str, Any]]:
    """What `state_dict()` gives on each rank, as `torch.save` would write it."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, optimizer.state_dict())
    return everyone


def assert_alike(want: Any, got: Any, where: str = "", *, exact: bool = True) -> None:
    """Same types, keys in the same order, dtypes, shapes, strides and devices, and with `exact` the same values."""
    assert type(want) is type(got), f"{where}: {type(want)} and {type(got)}"
    if isinstance(want, Tensor):
        for name in ("dtype", "shape", "device"):
            assert getattr(want, name) == getattr(got, name), f"{where}: {name}"
        assert want.stride() == got.stride() or want.numel() < 2, f"{where}: {want.stride()} and {got.stride()}"
        if exact:
            assert torch.equal(want, got), f"{where}: {(want - got).abs().max()}"
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    elif isinstance(want, dict):
        assert list(want) == list(got), f"{where}: {list(want)} and {list(got)}"
        for key in want:
            assert_alike(want[key], got[key], f"{where}.{key}", exact=exact)
    elif isinstance(want, (list, tuple)):
        assert len(want) == len(got), where
        for number, pair in enumerate(zip(want, got, strict=True)):
            assert_alike(*pair, f"{where}.{number}", exact=exact)
    else:
        assert want == got, f"{where}: {want} and {got}"
