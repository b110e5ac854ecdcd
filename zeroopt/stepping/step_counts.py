"""Step counts beyond 2^24, of which a float32 `step`, as torch's optimizers show it, is but the nearest number that it can be.

A kernel keeps a count as the sum of two float32 (csrc/common/step_count.h) and shows the first. Whoever saves state, or makes it anew
from what is shown, gets all of the count here, as float64, which torch's optimizers load and step with too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import StateError
from ..own_storage import with_own_storage
from ..plan.params import ParamState

MOST_EXACT = 2**24  # a float32 can be every whole number up to there

_Key = TypeVar("_Key")

# By what is shown of a count: all counts that lie side by side, float32 [2, n], and which of them it is.
_places: MutableMapping[Tensor, tuple[Tensor, int]] = WeakTensorKeyDictionary()


def show_count(steps: Tensor, number: int) -> Tensor:
    """What an optimizer's `state` shows of a count: a live float32, of which the rest can be found.

    Args:
        steps: float32 [2, n].
        number: of the count among the n.
    """
    shown = with_own_storage(steps[0, number])
    _places[shown] = steps, number
    return shown


def put_count(steps: Tensor, number: int, count: float) -> None:
    """Let a count be this whole number."""
    rounded = torch.tensor(count, dtype=torch.float32, device="cpu").item()
    steps[0, number], steps[1, number] = rounded, count - rounded


def count_of(step: Any) -> float:
    """All of a count, of which a state's `step` may be shown."""
    first = float(step)
    place = _places.get(step) if isinstance(step, Tensor) else None
    if place is None or first < MOST_EXACT:
        return first
    steps, number = place
    return first + float(steps[1, number])


def problem_with_count(step: Any) -> str | None:
    """What a step count of saved state is that no optimizer counts to; None for a whole number from 0 on, or a tensor that holds one."""
    number = step
    if isinstance(step, Tensor):
        if step.is_meta:
            return None
        if step.numel() != 1:
            return f"a tensor of shape {list(step.shape)}"
        number = step.item()
    if not isinstance(number, (int, float, np.integer, np.floating)):
        return f"{number!r}"
    is_count = math.isfinite(number) and number >= 0 and number == math.floor(number)
    return None if is_count else f"{number}"


def check_count(name: str, entry: Mapping[str, Any], where: str) -> None:
    """Raise StateError where the step count of a parameter's state is none.

    Args:
        name: of the parameter.
        where: who has the state, for the message.
    """
    problem = problem_with_count(entry["step"]) if "step" in entry else None
    if problem is not None:
        raise StateError(
            f"{where} has, as the step count of parameter {name!r}, {problem}: expected a whole number of steps, 0 or more. The state was "
            "damaged, or computed from something that was not finite: go on from one that was saved before"
        )


def count_tensor(count: float) -> Tensor:
    """A count as torch's optimizers keep it, 0-dim on the CPU, in memory of its own: float32 while that can be the count."""
    return torch.tensor(count, dtype=torch.float32 if count <= MOST_EXACT else torch.float64, device="cpu")


def with_exact_counts(state: Mapping[_Key, ParamState]) -> dict[_Key, ParamState]:
    """State whose step counts are float64, in memory of their own, where they are beyond what is shown exactly; else the entries as
    they are, live. On a device, the host waits for it."""
    counts: dict[int, list[float]] = {}  # by the address of those that lie side by side
    made = dict(state)
    for key, entry in state.items():
        step = entry.get("step")
        if not isinstance(step, Tensor) or step.is_meta:
            continue
        place = _places.get(step)
        if place is None:
            continue
        steps, number = place
        if id(steps) not in counts:
            first, rest = steps.to("cpu", torch.float64)
            counts[id(steps)] = torch.where(first < MOST_EXACT, first, first + rest).tolist()
        count = counts[id(steps)][number]
        if count > MOST_EXACT:
            made[key] = {**entry, "step": count_tensor(count).to(step.device)}
    return made


def as_float32(step: Tensor, device: torch.device) -> Tensor:
    """A step count as torch's fused optimizers keep it. What a float32 cannot hold can be found."""
    if step.dtype is not torch.float64 or step.dim() or step.is_meta:
        return step.to(device, torch.float32)
    steps = torch.zeros(2, 1, dtype=torch.float32, device=device)
    put_count(steps, 0, float(step))
    return show_count(steps, 0)
