"""All ranks have to wrap the same thing. They compare what they have before anything is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
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
    all-reduce a group; the lines themselves travel only when they differ.

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


def _disagreement(group: ControlGroup, lines: Sequence[str], problem: Exception | None, what: str) -> Exception | None:
    if not _differs(group, lines, problem, what):
        return None
    everyone = group.objects((list(lines), None if problem is None else str(problem)), what)
    return problem if problem is not None else RankMismatchError(_first_difference(everyone, what))


_GRAINS = {Grain.ELEMENT: "", Grain.PARAMETER: ", stepped whole", Grain.MATRIX: ", stepped as a matrix"}


def _differs(group: ControlGroup, lines: Sequence[str], problem: Exception | None, what: str) -> bool:
    """Whether any rank has other lines or a problem: the largest and the smallest digest over all ranks differ."""
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    words = [int.from_bytes(digest[i : i + 6], "big") for i in range(0, 30, 6)]  # positive in 64 bits
    flag = 0 if problem is None else 1
    message = torch.tensor([*words, *(-w for w in words), flag], dtype=torch.int64, device=group.device)
    values = group.largest(message, what).tolist()
    largest, smallest = values[: len(words)], [-v for v in values[len(words) : -1]]
    return largest != smallest or values[-1] != 0


def _first_difference(everyone: Sequence[tuple[list[str], str | None]], what: str) -> str:
    for rank, (_, problem) in enumerate(everyone):
        if problem is not None:
            return f"{what} failed on rank {rank}: {problem}"
    reference = everyone[0][0]
    for rank, (lines, _) in enumerate(everyone):
        for here, there in zip_longest(reference, lines, fillvalue="nothing more"):
            if here != there:
                return (
                    f"{what} got different things on different ranks; the first difference: rank 0 has [{here}], "
                    f"rank {rank} has [{there}]. Build the same model and optimizer, with the same options, on all ranks"
                )
    raise AssertionError("the digests of equal descriptions differ")


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
