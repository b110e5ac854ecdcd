"""The state of a parameter that is stepped in parts, from one entry to that of each part and back.

Such an entry is as follows, which state dicts and checkpoints have, too:

- What has an element for each of every part's is one tensor of the parameter's shape: the pieces are views of it.
- Step counts, and what else is no tensor and alike for all parts, are there once.
- Of anything else (factors of rows and columns, matrices of a side's size, a scale) each part has its own, whatever its shape, in a
  dict by which part that is, as torch would index it: ``{"0:6": …, "6:10": …}`` for rows, ``{":,0:6": …}`` for columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..plan.dtensors import local_of
from ..plan.params import ManagedParam, ParamState
from ..probing.probe import is_per_element

_NAME = re.compile(r"(:,)*\d+:\d+")


def part_names(owner: ManagedParam) -> list[str]:
    """How torch would index the parts of a parameter; none where it is stepped as it is."""
    if not owner.is_stepped_in_parts:
        return []
    return [
        ":," * owner.part_dim + f"{begin}:{end}" for begin, end in pairwise(accumulate(owner.part_sizes, initial=0))
    ]


def parts_of(owner: ManagedParam, values: Tensor) -> list[Tensor]:
    """The parts of a tensor of a parameter's shape, views."""
    return list(torch.split(values, owner.part_sizes, owner.part_dim))


def problem_with_parts(owner: ManagedParam, entry: Mapping[str, Any]) -> str | None:
    """Why an entry of state is not one of a parameter that consists of just these parts, in words; None where it is.

    Args:
        entry: of the optimizer's own state alone. Tensors may be DTensors.
    """
    names = part_names(owner)
    for name, value in entry.items():
        for leaf in tree_leaves(value, is_leaf=_is_of_parts):
            if _is_of_parts(leaf):
                if not leaf.keys() <= set(names):
                    return f"{name!r} of the parts {', '.join(leaf)}, and it is stepped {_in_words(names)}"
            elif names and isinstance(leaf, Tensor) and name != "step":
                shape = local_of(leaf).shape
                if shape and shape != owner.shape:
                    return f"{name!r} of shape {list(shape)}, which belongs to all of it, and it is stepped {_in_words(names)}"
    return None


def kept_by_part(entry: Mapping[str, Any]) -> list[str]:
    """Under which names an entry has something that each part keeps for itself."""
    return [name for name, value in entry.items() if any(map(_is_of_parts, tree_leaves(value, is_leaf=_is_of_parts)))]


def _in_words(names: Sequence[str]) -> str:
    return f"in the parts {', '.join(names)}" if names else "as it is"


def _is_of_parts(value: Any) -> bool:
    """Whether a value of state is what each part has for its own."""
    return isinstance(value, dict) and bool(value) and all(isinstance(k, str) and _NAME.fullmatch(k) for k in value)


class PartState:
    """The state of one parameter, taken apart for a step and put together again.

    What `cut` gives is written in place by a step, or replaced; `join` copies only the latter.
    """

    def __init__(self, owner: ManagedParam) -> None:
        self._owner = owner
        self._names = part_names(owner)
        self._cut: dict[int, tuple[Tensor, list[Tensor]]] = {}  # wholes and their pieces, by the first one's identity

    def cut(self, entry: ParamState) -> list[ParamState]:
        """The entry of each part."""
        entries: list[ParamState] = [{} for _ in self._names]
        for name, value in entry.items():
            by_part = (
                value if _is_of_parts(value) else dict(zip(self._names, self._cut_value(name, value), strict=True))
            )
            for part, own in zip(self._names, entries, strict=True):
                if part in by_part:
                    own[name] = by_part[part]
        return entries

    def _cut_value(self, name: str, value: Any) -> list[Any]:
        leaves, structure = tree_flatten(value, is_leaf=_is_of_parts)
        pieces = [self._cut_leaf(name, leaf) for leaf in leaves]
        return [tree_unflatten([one[number] for one in pieces], structure) for number in range(len(self._names))]

    def _cut_leaf(self, name: str, leaf: Any) -> list[Any]:
        if _is_of_parts(leaf):
            return [leaf[part] for part in self._names]
        if not isinstance(leaf, Tensor):
            return [leaf] * len(self._names)
        if leaf.shape != self._owner.shape or name == "step":
            return [leaf.clone() for _ in self._names]
        pieces = parts_of(self._owner, leaf)
        self._cut[id(pieces[0])] = leaf, pieces
        return pieces

    def join(self, entries: Sequence[ParamState]) -> ParamState:
        """The entry of the parameter; empty where no part has any."""
        joined: ParamState = {}
        for name in dict.fromkeys(chain.from_iterable(entries)):
            by_part = {part: own[name] for part, own in zip(self._names, entries, strict=True) if name in own}
            joined[name] = self._join_value(name, by_part)
        return joined

    def _join_value(self, name: str, by_part: dict[str, Any]) -> Any:
        flat = [tree_flatten(value) for value in by_part.values()]
        structure = flat[0][1]
        if len(by_part) < len(self._names) or any(other != structure for _, other in flat):
            return by_part  # as of optimizers that keep something only for what is not too large
        leaves = [self._join_leaf(name, values) for values in zip(*(leaves for leaves, _ in flat), strict=True)]
        return tree_unflatten(leaves, structure)

    def _join_leaf(self, name: str, values: Sequence[Any]) -> Any:
        parts = parts_of(self._owner, self._owner.local)
        if all(is_per_element(name, value, part) for value, part in zip(values, parts, strict=True)):
            return self._whole(values)
        if name == "step" or not any(isinstance(value, Tensor) or value != values[0] for value in values):
            return values[0]
        return dict(zip(self._names, values, strict=True))

    def _whole(self, values: Sequence[Tensor]) -> Tensor:
        whole, pieces = self._cut.get(id(values[0]), (None, []))
        if whole is not None and all(one is other for one, other in zip(values, pieces, strict=True)):
            return whole
        joined = torch.cat(list(values), self._owner.part_dim)
        shape, stride = self._owner.shape, self._owner.stride
        if joined.stride() == stride:
            return joined
        return torch.empty_strided(shape, stride, dtype=joined.dtype, device=joined.device).copy_(joined)
