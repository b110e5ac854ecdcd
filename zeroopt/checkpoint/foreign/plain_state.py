"""Making the state dict that a plain torch optimizer would have, out of what another library has saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...errors import StateError
from ...stepping.step_counts import count_tensor, problem_with_count

# What a param_group says of how, and not of what, an optimizer computes.
_OWN_OPTIONS = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}


def whole_state_dict(
    optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]], options: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The state dict of a plain torch optimizer.

    Args:
        state: by position of the parameter in `optimizer`.
        options: of each param_group; those that the optimizer does not have are left out, but for a scheduler's
            "initial_lr", and those that are missing are its own.
    """
    groups = []
    for group, positions, saved in zip(optimizer.param_groups, positions_by_group(optimizer), options, strict=True):
        own = {name: value for name, value in group.items() if name != "params"}
        groups.append({**own, **comparable_options(saved, own), "params": list(positions)})
    return {"state": {position: dict(state[position]) for position in sorted(state)}, "param_groups": groups}


def positions_by_group(optimizer: torch.optim.Optimizer) -> list[range]:
    """Positions of the parameters of each param_group."""
    ends = list(accumulate(len(group["params"]) for group in optimizer.param_groups))
    return [range(first, end) for first, end in zip([0, *ends], ends, strict=False)]


def comparable_options(saved: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """Saved options that mean something to an optimizer whose groups have those of `own`."""
    known = ({*own} | {"initial_lr"}) - _OWN_OPTIONS
    return {name: value for name, value in saved.items() if name in known}


def make_step(value: Any, where: Any) -> Tensor:
    """A step count as torch keeps it, 0-dim on the CPU, in memory of its own: optimizers add to it in place. Raises StateError where
    it is none."""
    problem = problem_with_count(value)
    if problem is not None:
        raise StateError(f"{where} has, as a step count, {problem}: expected a whole number of steps, 0 or more")
    return count_tensor(float(value))


def check_shape(name: str, key: str, value: Tensor, param: Tensor, where: Any) -> None:
    """Raise StateError when a saved tensor is not of its parameter's shape."""
    if value.shape != param.shape:
        raise StateError(
            f"{where} has {key!r} of shape {list(value.shape)} for parameter {name!r} of shape {list(param.shape)}: it "
            "was saved with another model"
        )
