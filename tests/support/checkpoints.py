"""What tests of checkpoints share: models that train on the same batch on all ranks, and all that is to be found again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from training import build, loss_of, optimizer_for

import zeroopt

BF16 = torch.bfloat16
TIERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "master": {"param_dtype": BF16},
    "remainder": {"param_dtype": BF16, "master_weights": "remainder"},
    "none": {"param_dtype": BF16, "master_weights": "none"},
    "int8": {"param_dtype": BF16, "master_weights": "remainder", "state_dtype": torch.int8},
    "bfloat16 state": {"state_dtype": BF16},
}

Model = zeroopt.ZeroDataParallel
Wrapped = tuple[Model, list[zeroopt.ZeroOptimizer]]
Recipe = Callable[[], tuple[nn.Module, list[torch.optim.Optimizer]]]
"""Makes a model and its optimizers, with the same weights each time."""


def wrap_all(recipe: Recipe, **options: Any) -> Wrapped:
    """What a recipe makes, wrapped."""
    torch.manual_seed(7)
    net, optimizers = recipe()
    model: Any = net
    wrapped = []
    for optimizer in optimizers:
        model, one = zeroopt.wrap(model, optimizer, **options)
        wrapped.append(one)
    return model, wrapped


def wrapped(model_name: str, optimizer_name: str, options: dict[str, Any]) -> tuple[Model, zeroopt.ZeroOptimizer]:
    """A model of `training` with two param_groups."""

    def recipe() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        net = build(model_name)
        return net, [optimizer_for(optimizer_name, net, groups=2)]

    model, (optimizer,) = wrap_all(recipe, **options)
    return model, optimizer


def same_batch(model_name: str, step: int) -> Tensor:
    """The same on all ranks, so that their number does not matter."""
    generator = torch.Generator().manual_seed(step)
    if model_name == "lm":
        return torch.randint(0, 37, (4, 6), generator=generator)
    return torch.randn((4, 7) if model_name == "mlp" else (4, 3, 8, 8), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, model_name: str, steps: range) -> None:
    """Train a model of `training`."""
    for step in steps:
        x = same_batch(model_name, step)
        dtype = next(model.parameters()).dtype
        loss_of(model(x.to(dtype) if x.is_floating_point() else x).float()).backward()
        optimizer.step()
        optimizer.zero_grad()


def all_of(model: Model, optimizers: list[zeroopt.ZeroOptimizer]) -> Any:
    """All that a checkpoint has to bring back, on all ranks alike: exact parameters, buffers, and the whole states."""
    trained = {managed.param: optimizer for optimizer in optimizers for managed in optimizer.state_dicts.params}
    values: dict[str, Any] = {}
    for name, param in model.named_parameters():
        values[name] = trained[param].full_parameter(param) if param in trained else param.detach().clone()
    values |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return values, [whole_state(optimizer) for optimizer in optimizers]


def whole_state(optimizer: zeroopt.ZeroOptimizer) -> dict[str, Any]:
    """What `full_state_dict()` gives, on all ranks, but for what says how the state was kept."""
    everyone: list[Any] = [None]
    optimizer.consolidate_state_dict()
    first = optimizer.replica.group
    if first.rank() == 0:
        whole = dict(optimizer.full_state_dict())
        whole["beyond torch"] = whole.pop("zeroopt", {}).get("state", {})
        everyone = [whole]
    dist.broadcast_object_list(everyone, dist.get_global_rank(first, 0), group=first)
    result: dict[str, Any] = everyone[0]
    return result


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Bit for bit, tensors within whatever containers."""
    if isinstance(other, dict):
        assert one.keys() == other.keys(), f"{where}: {list(one)}, not {list(other)}"
        for key, value in other.items():
            assert_same(one[key], value, f"{where}[{key!r}]")
    elif isinstance(other, (list, tuple)):
        assert type(one) is type(other), f"{where}: {type(one)}, not {type(other)}"
        for index, (mine, value) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, value, f"{where}[{index}]")
    elif isinstance(other, Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    else:
        assert one == other, where


def assert_all_same(values: list[Any], expected: Any) -> None:
    """What each rank gave."""
    for value in values:
        assert_same(value, expected)
