"""The options of param_groups as checkpoints have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError
from ...optimizer import ZeroOptimizer
from ..format.reading import Checkpoint
from .contents import clean_name
from .parts import named_groups
from .targets import Names, put

_KEY = "param_groups"


def read_groups(checkpoint: Checkpoint, names: Names) -> list[dict[str, Any]]:
    """The saved groups, with names or positions of parameters. Reads them from the disk.

    Raises:
        CheckpointError: they cannot be read.
    """
    keys = dict(names.below(_KEY))
    memory = {key: names.memory(key) for key in keys}
    values = {**memory, **checkpoint.read(memory)}
    if any(isinstance(names.path(key, rest)[0], str) for key, rest in keys.items()):
        return _by_parameter({rest: values[key] for key, rest in keys.items()})
    groups: list[dict[str, Any]] = []
    for key, rest in keys.items():
        put(groups, names.path(key, rest), values[key])
    return groups


def _by_parameter(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Options that were saved for each parameter, as with `flatten_optimizer_state_dict`: a group for each."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        name, _, option = key.rpartition(".")
        groups.setdefault(name, {"params": [name]})[option] = value
    return list(groups.values())


def has_positions(saved: Sequence[dict[str, Any]]) -> bool:
    """Whether saved groups know parameters by their numbers, as those of a plain optimizer's state dict."""
    return any(isinstance(param, int) for group in saved for param in group.get("params", ()))


@dataclass(frozen=True)
class MatchedGroups:
    """What saved groups mean to an optimizer.

    Attributes:
        groups: for each of its groups the saved options, with positions of parameters.
        unknown: positions of parameters that are in no saved group.
    """

    groups: list[dict[str, Any]]
    unknown: frozenset[int]


def match_groups(optimizer: ZeroOptimizer, saved: Sequence[dict[str, Any]], *, strict: bool) -> MatchedGroups:
    """Find for each group of an optimizer the saved one that has its parameters; for one without parameters, that without
    parameters at the same place.

    Args:
        strict: all parameters have to be in saved groups; else those that are decide, and a group of none keeps its options.

    Raises:
        CheckpointError: there is none, or they are in several that have different options, or it cannot be told which.
    """
    packed = optimizer.state_dicts.pack_groups()
    found = _find_params(optimizer, packed, saved)
    unknown = frozenset(position for group in found for position, place in group.items() if place is None)
    if strict and unknown:
        first = min(unknown)
        number = next(number for number, group in enumerate(found) if first in group)
        raise CheckpointError(
            f"the checkpoint has no param_group with parameter {clean_name(optimizer.names()[first])!r}, which is in group "
            f"{number} here; strict=False loads what both have"
        )
    places = [{place for place in group.values() if place is not None} for group in found]
    empty = {place for place, group in enumerate(saved) if not group.get("params")}
    groups = []
    for number, group in enumerate(packed):
        of_group = places[number] if group["params"] else _places_of_empty(number, places, empty)
        groups.append({**group, **_common_options(number, [saved[place] for place in sorted(of_group)])})
    return MatchedGroups(groups, unknown)


def _find_params(
    optimizer: ZeroOptimizer, packed: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]
) -> list[dict[int, int | None]]:
    """For each group, for each of its parameters by position, which saved group has it."""
    owner = {name: place for place, group in enumerate(saved) for name in group.get("params", ())}
    return [
        {
            position: owner.get(name, owner.get(position))
            for name, position in zip(named["params"], group["params"], strict=True)
        }
        for named, group in zip(named_groups([optimizer]), packed, strict=True)
    ]


def _places_of_empty(number: int, places: Sequence[set[int]], empty: set[int]) -> set[int]:
    """Which saved groups a group without parameters may be: that at its place, where the groups around were saved in the order
    that they have here; else any without parameters."""
    shifts = {place - other for other, of_group in enumerate(places) for place in of_group}
    if len(shifts) == 1 and number + min(shifts) in empty:
        return {number + min(shifts)}
    return empty


def _common_options(number: int, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    options = [
        {name: value for name, value in group.items() if name not in ("params", "param_names")} for group in groups
    ]
    if any(str(other) != str(options[0]) for other in options):
        raise CheckpointError(
            f"parameters of param_group {number} were saved in groups of different options: give the optimizer the same "
            "param_groups"
            if groups[0].get("params")
            else f"param_group {number} has no parameters, and the checkpoint has {len(groups)} such groups of different "
            "options: give the optimizer the same param_groups in the same order"
        )
    return options[0] if options else {}
