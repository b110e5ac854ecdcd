"""All ranks have to wrap the same thing. They compare what they have before anything is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..collectives import ControlGroup
from ..errors import RankMismatchError
from .dtensors import describe_part
from .params import Grain, ManagedParam


def agree(
    groups: Sequence[tuple[ControlGroup, Sequence[str]]], problem: Exception | None, what: str = "zeroopt.wrap"
) -> None:
    """Return when in each group every rank called with the same lines and nobody had a problem; else raise on every rank.

    Collective: every rank of the groups must call it. They are compared one after the other, and a rank in several of them
    passes a problem on from one to the next: ranks that are in no group together hear of it too. Usually it costs one small
    all-reduce a group. Where lines differ, some more find the first one that does, and then two lines travel: what a rank hears does
    not grow with the number of ranks.

    Args:
        groups: each with the description of what this rank is about to do, in an order that its ranks share.
        problem: what is wrong on this rank alone, if anything is.
        what: what is to be agreed on, for messages.

    Raises:
        Exception: this rank's own problem, as it is.
        CollectiveError: a rank did not do its part.
        RankMismatchError: another rank has a problem, or the first difference between two ranks; the same text everywhere.
    """
    for group, lines in groups:
        problem = _disagreement(group, lines, problem, what)
    if problem is not None:
        raise problem


_GRAINS = {Grain.ELEMENT: "", Grain.PARAMETER: ", stepped whole", Grain.MATRIX: ", stepped as a matrix"}
_END = "nothing more"  # behind the last line
_LOWEST = -(1 << 62)  # of a rank that has no say


def _disagreement(group: ControlGroup, lines: Sequence[str], problem: Exception | None, what: str) -> Exception | None:
    # A rank with a problem differs from all others, and from itself.
    said = [*_digest(lines), 0 if problem is None else 1 + group.rank]
    if _are_alike(group, said, what) and (problem is None or group.size > 1):
        return None
    failed = group.first(problem is not None, what)
    if failed is None:
        return RankMismatchError(_first_difference(group, lines, what))
    text = group.tell(str(problem), failed, what)
    return RankMismatchError(f"{what} failed on rank {failed}: {text}") if problem is None else problem


def _first_difference(group: ControlGroup, lines: Sequence[str], what: str) -> str:
    first = torch.tensor(_digest(lines), dtype=torch.int64, device=group.device)
    group.broadcast([first], 0, what)
    odd = group.first(first.tolist() != _digest(lines), what)
    assert odd is not None
    is_one_of_two = group.rank in (0, odd)
    length = torch.tensor(len(lines) if is_one_of_two else 0, dtype=torch.int64, device=group.device)
    alike, unlike = 0, int(group.largest(length, what))  # so many lines from the first one on
    while unlike - alike > 1:
        middle = (alike + unlike) // 2
        part = [*lines[:middle], *[_END] * (middle - len(lines))]
        if _are_alike(group, _digest(part) if is_one_of_two else None, what):
            alike = middle
        else:
            unlike = middle
    here, there = (group.tell(lines[alike] if alike < len(lines) else _END, rank, what) for rank in (0, odd))
    return (
        f"{what} got different things on different ranks; the first difference: rank 0 has [{here}], "
        f"rank {odd} has [{there}]. Build the same model and optimizer, with the same options, on all ranks"
    )


def _digest(lines: Sequence[str]) -> list[int]:
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    return [int.from_bytes(digest[i : i + 6], "big") for i in range(0, 30, 6)]  # positive in 64 bits


def _are_alike(group: ControlGroup, numbers: Sequence[int] | None, what: str) -> bool:
    """Whether all ranks have the same five numbers, or None: the largest and the smallest of all ranks are the same."""
    both = [_LOWEST] * 10 if numbers is None else [*numbers, *(-number for number in numbers)]
    told = group.largest(torch.tensor(both, dtype=torch.int64, device=group.device), what).tolist()
    return all(largest == -smallest for largest, smallest in zip(told, told[len(told) // 2 :], strict=False))


def describe_params(params: Sequence[ManagedParam]) -> list[str]:
    """What ranks have to have in common of the parameters that they train."""
    return [
        f"parameter {m.name!r} of shape {list(m.shape)}, {m.param.dtype}, strides {list(m.stride)}{describe_part(m.param)}, "
        f"in param_group {m.group}{_GRAINS[m.grain]}"
        for m in params
    ]


def describe_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    """What ranks have to have in common of an optimizer."""
    return [f"optimizer {type(optimizer).__name__}", *describe_options(optimizer.param_groups)]


def describe_options(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """What ranks have to have in common of param_groups."""
    lines = []
    for number, group in enumerate(groups):
        options = ", ".join(
            f"{key}={_plain(group[key])}" for key in sorted(group) if key not in ("params", "param_names")
        )
        lines.append(f"param_group {number} with {options}")
    return lines


def _plain(value: Any) -> str:
    """An option as text that is the same on every rank: no addresses of objects."""
    if isinstance(value, torch.Tensor):
        return repr(value.tolist())
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_plain, value))})"
    return repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__
