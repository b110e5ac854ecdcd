"""State as torch's own `load_state_dict` would make it of what any of its releases saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan.params import ParamState
from ..stepping.step_counts import as_float32
from ..storage.masters import MASTER_NAMES
from .entries import OUTER

_NOT_THE_OPTIMIZERS = frozenset({*MASTER_NAMES, OUTER})

_HOW = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Options that say by which of torch's implementations an optimizer computes, and nothing of what. Those of another machine may
not work on this one."""


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a saved param_group that a loading optimizer takes over."""
    return {name: value for name, value in group.items() if name != "params" and name not in _HOW}


def brought_up_to_date(
    optimizer: torch.optim.Optimizer,
    state: Mapping[Tensor, ParamState],
    groups: Sequence[Mapping[str, Any]],
    params: Sequence[Sequence[Tensor]],
) -> tuple[dict[Tensor, ParamState], list[dict[str, Any]]]:
    """State and options of groups as the optimizer has to have them. Changes nothing.

    torch's optimizers, and others, know in `__setstate__` how to read what earlier releases saved: step counts that were
    numbers, and options that did not exist. It is asked on a twin.

    Args:
        groups: saved ones, one for each of the optimizer's.
        params: the keys of the state that belong to each group.
    """
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    merged = [
        {**own, **options_of(saved), "params": list(members)}
        for own, saved, members in zip(optimizer.param_groups, groups, params, strict=True)
    ]
    known = {param: {n: v for n, v in entry.items() if n not in _NOT_THE_OPTIMIZERS} for param, entry in state.items()}
    known = {param: entry for param, entry in known.items() if entry}  # these may come before all else
    twin.__setstate__({"state": defaultdict(dict, known), "param_groups": merged})
    for group in twin.param_groups:
        for param in group["params"]:
            entry = twin.state.get(param, {})
            if isinstance(entry.get("step"), Tensor):
                entry["step"] = _step_count(optimizer, group, param, entry["step"])
    named = ("params", "param_names")
    options = [{name: value for name, value in group.items() if name not in named} for group in twin.param_groups]
    return {param: {**entry, **twin.state.get(param, {})} for param, entry in state.items()}, options


def _step_count(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], param: Tensor, step: Tensor) -> Tensor:
    """As torch's optimizers keep it: where they compute with it."""
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and step.shape == (1,):
        step = step.reshape(())  # of torch 2.0, fused or capturable
    if not group.keys() & _HOW:
        return step
    if group.get("capturable") or group.get("fused"):
        return as_float32(step, param.device)
    return step.cpu()
