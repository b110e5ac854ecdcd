"""The options of param_groups as checkpoints have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import CheckpointError
from ..optimizer import ZeroOptimizer
from .parts import named_groups
from .reading import Checkpoint
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


def match_groups(optimizer: ZeroOptimizer, saved: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each group of an optimizer the options of the saved one that has its parameters, with positions of parameters.

    Raises:
        CheckpointError: there is none, or they are in several that have different options.
    """
    owner = {name: group for group in saved for name in group["params"]}
    matched = []
    for number, (packed, named) in enumerate(
        zip(optimizer.state_dicts.pack_groups(), named_groups([optimizer]), strict=True)
    ):
        found = [
            owner.get(name, owner.get(position))
            for name, position in zip(named["params"], packed["params"], strict=True)
        ]
        if None in found:
            missing = named["params"][found.index(None)]
            raise CheckpointError(
                f"the checkpoint has no param_group with parameter {missing!r}, which is in group {number} here"
            )
        options = [_options(group) for group in found if group is not None]
        if any(str(other) != str(options[0]) for other in options):
            raise CheckpointError(
                f"parameters of param_group {number} were saved in groups of different options: give the optimizer the same "
                "param_groups"
            )
        matched.append({**packed, **(options[0] if options else {})})
    return matched


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}
