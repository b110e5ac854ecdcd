"""Small models, batches and optimizers, and one training loop that runs under DDP or under zeroopt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import zeroopt

BATCH = 4


class Mlp(nn.Module):
    """Biases and sizes that nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 129), nn.GELU(), nn.Linear(129, 5))
        self.scale = nn.Parameter(torch.tensor(1.5))  # 0-dim

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale

    @staticmethod
    def inputs(generator: torch.Generator) -> Tensor:
        return torch.randn(BATCH, 7, generator=generator)


class ConvNet(nn.Module):
    """Convolutions in channels-last memory, norms with buffers, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 13, 3), nn.BatchNorm2d(13), nn.ReLU(), nn.Conv2d(13, 11, 3, bias=False), nn.BatchNorm2d(11)
        ).to(memory_format=torch.channels_last)
        self.norm = nn.LayerNorm(11)
        self.head = nn.Linear(11, 3)
        self.body[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x).mean(dim=(2, 3))))

    @staticmethod
    def inputs(generator: torch.Generator) -> Tensor:
        return torch.randn(BATCH, 3, 8, 8, generator=generator)


class TinyLm(nn.Module):
    """Embeddings, tied weights, and a parameter used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 18)
        self.block = nn.Linear(18, 18)
        self.norm = nn.LayerNorm(18)
        self.out = nn.Linear(18, 37, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(2):
            x = x + torch.relu(self.block(self.norm(x)))
        return self.out(x)

    @staticmethod
    def inputs(generator: torch.Generator) -> Tensor:
        return torch.randint(0, 37, (BATCH, 6), generator=generator)


class Halves(nn.Module):
    """The sign of the input's first element says which half of the parameters is used; a third one never is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.never = nn.Linear(7, 50), nn.Linear(7, 50), nn.Linear(7, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if x[0, 0] > 0 else self.down(x)


MODELS: dict[str, type[Mlp | ConvNet | TinyLm]] = {"mlp": Mlp, "conv": ConvNet, "lm": TinyLm}


class SignMomentum(torch.optim.Optimizer):
    """A user's own optimizer: element-wise, with state and a scalar of its own."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                average = self.state[param].setdefault("average", torch.zeros_like(param))
                average.lerp_(param.grad, 1 - group["momentum"])
                param.sub_(average.sign(), alpha=group["lr"] / self.calls)


OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adam_maximize": lambda p: torch.optim.Adam(p, lr=0.001, maximize=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "rmsprop_centered": lambda p: torch.optim.RMSprop(p, lr=0.001, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "own": SignMomentum,
}


def build(model_name: str) -> nn.Module:
    """The model, with the same weights wherever it is built."""
    torch.manual_seed(1234)
    return MODELS[model_name]()


def batch(model_name: str, step: int, rank: int | None = None) -> Tensor:
    """A rank's inputs for a step; this one's where none is named."""
    generator = torch.Generator().manual_seed(1000 * step + (dist.get_rank() if rank is None else rank))
    return MODELS[model_name].inputs(generator)


def loss_of(output: Tensor) -> Tensor:
    """Cross entropy with class 0 as the target: gradients stay bounded, so rounding does not grow from step to step."""
    return (output.logsumexp(dim=-1) - output[..., 0]).mean()


def optimizer_for(name: str, model: nn.Module, groups: int = 1) -> torch.optim.Optimizer:
    """An optimizer over `groups` param_groups with learning rates of their own."""
    params = list(model.parameters())
    if groups == 1:
        return OPTIMIZERS[name](params)
    parts = [{"params": params[i::groups]} for i in range(groups)]
    optimizer = OPTIMIZERS[name](parts)
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = group["lr"] * (1 + i)
    return optimizer


def ddp(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    return DistributedDataParallel(model), optimizer


def prepare(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: dict[str, Any] | None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap with zeroopt's options, or with DDP for None."""
    return ddp(model, optimizer) if options is None else zeroopt.wrap(model, optimizer, **options)


def prepare_all(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], options: dict[str, Any] | None
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """Wrap with several optimizers, or with DDP for None."""
    if options is None:
        return DistributedDataParallel(model, find_unused_parameters=True), optimizers
    wrapped = []
    for optimizer in optimizers:
        model, one = zeroopt.wrap(model, optimizer, **options)
        wrapped.append(one)
    return model, wrapped


def snapshot(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters and buffers."""
    return [value.detach().clone() for value in (*model.parameters(), *model.buffers())]


def train(
    model_name: str,
    optimizer_name: str,
    options: dict[str, Any] | None,
    steps: int = 4,
    groups: int = 1,
    follow: list[list[Tensor]] | None = None,
) -> list[list[Tensor]]:
    """Train and return parameters and buffers after each step.

    Args:
        options: zeroopt.wrap's, or None for DDP.
        follow: another run's history. Each step then starts from that run's parameters, so that a difference shows what
            one step does, not what a model makes of it in the steps that follow.
    """
    net = build(model_name)
    model, optimizer = prepare(net, optimizer_for(optimizer_name, net, groups), options)
    history = []
    for step in range(steps):
        loss_of(model(batch(model_name, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(snapshot(net))
        if follow is not None:
            restore(net, follow[step])
    return history


@torch.no_grad()
def restore(model: nn.Module, values: list[Tensor]) -> None:
    """The inverse of `snapshot`."""
    for mine, value in zip((*model.parameters(), *model.buffers()), values, strict=True):
        mine.copy_(value)


Variants = list[dict[str, Any] | None]


def train_all(
    model_name: str, optimizer_name: str, variants: Variants, steps: int = 4, groups: int = 1
) -> list[list[list[Tensor]]]:
    """`train` once for each variant, in one call of the worker pool."""
    return [train(model_name, optimizer_name, options, steps, groups) for options in variants]


def train_step_by_step(
    model_name: str, optimizer_name: str, variants: Variants, steps: int = 4, groups: int = 1
) -> list[list[list[Tensor]]]:
    """`train_all`, where each step of each later variant starts from the parameters of the first variant."""
    first = train(model_name, optimizer_name, variants[0], steps, groups)
    rest = [train(model_name, optimizer_name, options, steps, groups, follow=first) for options in variants[1:]]
    return [first, *rest]
