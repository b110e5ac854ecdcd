"""The outer optimizer: any torch optimizer that treats each element by itself, made of flat parameters by a user's function.

A rank's parameters are slices of buckets, which are stepped a bucket at a time: what is stepped beside an element must not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, NotSupportedError
from ...options.outer import OuterFactory
from ...plan.agreement import describe_groups
from ...plan.params import Grain
from ...probing.grains import find_grains
from ...probing.probe import is_per_element

_TRIED_NUMEL = 8

PlainOptions = list[dict[str, Any]]
"""The options of param_groups, of what JSON has."""


def make_outer(factory: OuterFactory, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Have the outer optimizer made.

    Raises:
        ConfigError: it is none, or steps other parameters.
    """
    made = factory(list(params))
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(f"expected outer_optimizer to make a torch optimizer, got {type(made).__name__}")
    groups = [group["params"] for group in made.param_groups]
    if len(groups) != 1 or list(map(id, groups[0])) != list(map(id, params)):
        raise ConfigError(
            "expected outer_optimizer to make an optimizer with all parameters that it is given in one param_group, got one with "
            f"{len(groups)} param_groups of {sum(map(len, groups))} parameters for {len(params)}"
        )
    return made


def make_tried(factory: OuterFactory) -> torch.optim.Optimizer:
    """The outer optimizer of a small parameter, on which it is tried."""
    return make_outer(factory, [nn.Parameter(torch.zeros(_TRIED_NUMEL, device="cpu"))])


def inspect_outer(factory: OuterFactory) -> list[str]:
    """Try the outer optimizer on a small parameter. Returns what all ranks have to have in common of it.

    Raises:
        ConfigError: as `make_outer`.
        NotSupportedError: it cannot step slices of buckets.
    """
    made = make_tried(factory)
    (param,) = made.param_groups[0]["params"]
    name = type(made).__name__
    described = [f"outer {line}" for line in describe_groups(made)]
    if find_grains(made) != [Grain.ELEMENT]:
        raise NotSupportedError(
            f"the outer optimizer steps slices of buckets, and {name} needs whole parameters: take one that treats each element "
            "by itself, such as SGD or Adam"
        )
    before = pack_options(made)
    param.grad = torch.ones_like(param)
    made.step()
    if pack_options(made) != before:
        raise NotSupportedError(
            f"the outer optimizer steps one bucket after the other, and {name} counts its steps in the options of a param_group: take "
            "one that keeps such in the state of each parameter"
        )
    for key, value in made.state.get(param, {}).items():
        if not (is_per_element(key, value, param) or isinstance(value, int | float) or is_number(value)):
            raise NotSupportedError(
                f"the outer optimizer {name} keeps a {type(value).__name__} as {key!r}: zeroopt saves and loads what has an element "
                "for each of a parameter's, and numbers"
            )
    return described


def is_number(value: object) -> bool:
    """Whether a value of state is a number in a tensor, such as a step count."""
    return isinstance(value, Tensor) and value.dim() == 0


def pack_options(optimizer: torch.optim.Optimizer) -> PlainOptions:
    """The options of its param_groups, to be saved and compared."""
    return [{name: _plain(value) for name, value in g.items() if name != "params"} for g in optimizer.param_groups]


def take_options(optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Let options that were packed be those of the optimizer, as far as it has such."""
    for group, options in zip(optimizer.param_groups, saved, strict=False):
        for name, value in options.items():
            here = group.get(name)
            if isinstance(here, Tensor):
                here.fill_(value)
            elif name in group:
                group[name] = tuple(value) if isinstance(here, tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)
