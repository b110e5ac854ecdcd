"""What of a wrapped optimizer is reachable through the one that `zeroopt.wrap` returns, beyond what every optimizer has.

Plain values are: numbers, texts, and containers of such. Its methods and properties are not, for they would see parameters
without the state that belongs to them, which is on several ranks and in pieces; nor are tensors. Static and class methods do
not see the optimizer, but they are given its state: they are reachable where each rank has all of it.
"""

from __future__ import annotations

from inspect import getattr_static
from typing import Any

import torch

from .probing.probe import is_torchs_own

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def reach(inner: torch.optim.Optimizer, name: str, *, has_all_state: bool) -> Any:
    """An attribute of the wrapped optimizer.

    Raises:
        AttributeError: it has none of that name, or not one to be reached.
    """
    cls = type(inner).__name__
    found = vars(inner).get(name, getattr_static(type(inner), name, _PLAIN))
    if found is _PLAIN or is_torchs_own(name) or name.startswith("__"):
        raise AttributeError(f"neither ZeroOptimizer nor the {cls} within has an attribute {name!r}")
    if isinstance(found, (staticmethod, classmethod)) and has_all_state:
        return getattr(inner, name)
    if _is_plain(found):
        return found
    raise AttributeError(
        f"{name!r} of the wrapped {cls} cannot be used here: what is no plain value may need its state, of which each rank has "
        "a part. Collect it with consolidate_state_dict(), or use stage=0"
    )


def takes(inner: torch.optim.Optimizer, name: str, value: Any) -> bool:
    """Whether an attribute that is set is one of the wrapped optimizer's plain values."""
    attributes = vars(inner)
    public = name in attributes and not is_torchs_own(name) and not name.startswith("_")
    return public and _is_plain(attributes[name]) and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for item in value.items() for part in item)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
