"""What a user makes of param_groups by hand: torch's optimizers read them anew in every step, and so must this one.

A parameter that moves to another group gets that one's options; one that is in no group any more is not stepped and leaves its
bucket; one that is new is taken in, as by `add_param_group`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, NotSupportedError
from ..plan.agreement import describe_groups, describe_params
from ..plan.params import ManagedParam
from ..probing.grains import find_grains
from .candidates import inspect_further

Groups = Sequence[Mapping[str, Any]]


class GroupMembers:
    """The groups of an optimizer as they were when they were last taken up."""

    def __init__(self) -> None:
        self.groups: list[Mapping[str, Any]] = []
        self._members: list[list[Tensor]] = []

    def note(self, groups: Groups) -> None:
        """Take them up as they are."""
        self.groups = list(groups)
        self._members = [list(group["params"]) for group in groups]

    def differ(self, groups: Groups) -> bool:
        """Whether other parameters are in the groups, or in another order. Options do not count."""
        if len(groups) != len(self._members):
            return True
        for group, members in zip(groups, self._members, strict=True):
            params = group.get("params")
            if not isinstance(params, (list, tuple)) or len(params) != len(members):
                return True
            if not all(map(operator.is_, params, members)):
                return True
        return False


@dataclass
class GroupEdit:
    """What has to be done about edited groups.

    Attributes:
        places: group and position of the parameters that stay.
        gone: those that are in no group any more.
        new: those that are to be taken in.
        lines: what ranks have to have in common of it.
    """

    places: dict[ManagedParam, tuple[int, int]] = field(default_factory=dict)
    gone: list[ManagedParam] = field(default_factory=list)
    new: list[ManagedParam] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def inspect_edit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    known: Sequence[ManagedParam],
    own: Sequence[ManagedParam],
    before: GroupMembers,
    home: torch.device | None,
) -> GroupEdit:
    """What has become of the groups. Changes nothing, and is not collective.

    Args:
        known: the parameters that are trained.
        own: those of them that this optimizer trains.
        before: its groups as they were.
        home: where it steps; None: where the parameters are.

    Raises:
        ConfigError, NotSupportedError: the groups cannot be trained as they are.
    """
    groups = optimizer.param_groups
    _check_groups(groups, optimizer.defaults)
    fresh = [number for number, group in enumerate(groups) if not any(group is other for other in before.groups)]
    edit = GroupEdit(new=inspect_further(module, optimizer, known, own, fresh, home))
    found: dict[Tensor, tuple[int, int]] = {}
    for number, group in enumerate(groups):
        for param in group["params"]:
            found[param] = (number, len(found))
    for managed in own:
        if managed.param in found:
            edit.places[managed] = found[managed.param]
        else:
            edit.gone.append(managed)
    if not edit.places and not edit.new:
        raise ConfigError("no parameter is left in the param_groups that requires gradients: there is nothing to train")
    _check_grains(optimizer, edit.places, before, home)
    described = [f"parameter {m.name!r} in param_group {group}" for m, (group, _) in edit.places.items()]
    removed = [f"parameter {m.name!r} in no param_group" for m in edit.gone]
    edit.lines = [*described, *removed, *describe_params(edit.new), *describe_groups(optimizer)]
    return edit


def _check_groups(groups: Groups, defaults: Mapping[str, Any]) -> None:
    for number, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)):
            raise ConfigError(f"expected param_group {number} to be a dict with a list of parameters under 'params'")
        missing = sorted(defaults.keys() - group.keys())
        if missing:
            raise ConfigError(
                f"param_group {number} lacks the options {', '.join(missing)}; add_param_group sets those that are not given"
            )
        for place, param in enumerate(group["params"]):
            if not isinstance(param, Tensor):
                raise ConfigError(
                    f"expected a parameter at place {place} of param_group {number}, got {type(param).__name__}"
                )


def _check_grains(
    optimizer: torch.optim.Optimizer,
    places: Mapping[ManagedParam, tuple[int, int]],
    before: GroupMembers,
    home: torch.device | None,
) -> None:
    """A parameter that ranks share element by element must not come under options that need it whole."""
    moved = {
        m: group for m, (group, _) in places.items() if optimizer.param_groups[group] is not before.groups[m.group]
    }
    targets = sorted(set(moved.values()))
    grains = dict(zip(targets, find_grains(optimizer, targets, home), strict=True))
    for managed, group in moved.items():
        if grains[group] > managed.grain:
            raise NotSupportedError(
                f"parameter {managed.name!r} was moved to param_group {group}, whose options need whole parameters, and ranks "
                "have cut it into pieces: wrap with these groups from the beginning"
            )
