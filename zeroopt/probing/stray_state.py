"""What an optimizer keeps of its parameters where ranks do not look for it.

They step pieces in the place of parameters, and move and save what is in `state[param]`, tensor by tensor. State in an attribute
would stay behind; so would a list of parameters that the step goes through instead of its param_groups.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from inspect import isroutine
from typing import Any

import torch
from torch import Tensor, nn

from ..plan.dtensors import is_distributed
from .probe import is_torchs_own

_DEPTH = 6


def find_stray_state(optimizer: torch.optim.Optimizer, params: Collection[Tensor], numel: int = 0) -> str | None:
    """Where something of the parameters is that should be in `state[param]`, in words; None where nothing is.

    Args:
        params: those in the optimizer's param_groups.
        numel: a tensor of so many elements belongs to one of them; 0 where it may be anything, such as a table of codes.
    """
    derived: Collection[str] = getattr(type(optimizer), "derived_attributes", ())  # which `zeroopt.optim` makes anew
    attributes = {name: v for name, v in vars(optimizer).items() if not is_torchs_own(name) and name not in derived}
    places = [(f"its attribute {name!r}", value) for name, value in attributes.items()]
    for group in optimizer.param_groups:
        places += [
            (f"the option {name!r} of a param_group", value)
            for name, value in dict.items(group)
            if name not in ("params", "param_names")
        ]
    for where, value in places:
        what = _what_belongs_to(params, numel, value)
        if what is not None:
            return f"{what} in {where}"
    for key, entry in optimizer.state.items():
        if not isinstance(key, Tensor):
            return f"state under {key!r}, which is no parameter,"
        what = _what_no_rank_can_cut(entry)
        if what is not None:
            return what
    return None


def _what_belongs_to(params: Collection[Tensor], numel: int, value: Any) -> str | None:
    numbers = {id(param) for param in params}
    for part in _parts(value, set(), _DEPTH):
        if isinstance(part, torch.optim.Optimizer):
            return f"another optimizer, {type(part).__name__},"
        if id(part) in numbers or (type(part) is int and part in numbers):
            return "references to parameters"
        if isinstance(part, Tensor) and part.numel() == numel > 0:
            return "tensors for parameters"
    return None


def _parts(value: Any, seen: set[int], depth: int) -> Iterator[Any]:
    """The value and what is in it: in containers, as their keys too, and in the attributes of plain objects."""
    if isinstance(value, weakref.ref):
        value = value()
    if id(value) in seen or depth < 0:
        return
    if not isinstance(value, (int, float, str)):
        seen.add(id(value))
    yield value
    inside: list[Any] = []
    if isinstance(value, Mapping):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, deque, AbstractSet)):
        inside = list(value)
    elif isinstance(value, nn.Module):
        inside = list(value.parameters())
    elif not isinstance(value, (Tensor, type)) and not isroutine(value) and hasattr(value, "__dict__"):
        inside = list(vars(value).values())
    for part in inside:
        yield from _parts(part, seen, depth - 1)


def _what_no_rank_can_cut(entry: Any) -> str | None:
    """Tensors in state that are not plain, or not in dicts, lists and tuples alone."""
    if isinstance(entry, Tensor):
        plain = type(entry) in (Tensor, nn.Parameter) or is_distributed(entry)
        return None if plain else f"state in tensors of the class {type(entry).__name__}"
    if isinstance(entry, dict) or type(entry) in (list, tuple):
        parts = entry.values() if isinstance(entry, dict) else entry
        return next((found for part in parts if (found := _what_no_rank_can_cut(part)) is not None), None)
    if any(isinstance(part, Tensor) for part in _parts(entry, set(), _DEPTH)):
        return f"tensors of its state in a {type(entry).__name__}"
    return None
