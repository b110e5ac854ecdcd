"""How much state an optimizer keeps for a tensor: asked of a copy of it that steps one without memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..untraced import uncompiled
from .probe import copy_with, step_without_hooks

_FLAT_NUMEL = 4096
# Stand for the dimensions of a tensor that an optimizer can only step for real: each is known again by its size.
_SIZES = (37, 41, 43, 47, 53, 59)


class StateSize:
    """The bytes of state of tensors that one group of an optimizer steps. The optimizer itself is left alone.

    Args:
        group: position of the group.
        device: where a tensor is stepped for real when it cannot be without memory; torch's default when None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: int, device: torch.device | None = None) -> None:
        self._optimizer, self._group, self._device = optimizer, group, device
        self._known: dict[tuple[tuple[int, ...], torch.dtype], int] = {}

    def of_elements(self, numel: int, dtype: torch.dtype) -> int:
        """Of so many elements, which are stepped each by itself."""
        return round(self.of_tensor((_FLAT_NUMEL,), dtype) * numel / _FLAT_NUMEL)

    def of_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Of a tensor that is stepped whole, after its first steps. Numbers, such as counts of steps, do not count."""
        key = tuple(shape), dtype
        if key not in self._known:
            self._known[key] = self._ask(*key)
        return self._known[key]

    def _ask(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        with suppress(Exception):  # it looks at values
            return sum(value.nbytes for value in self._step(torch.empty(shape, dtype=dtype, device="meta")))
        small = shape if prod(shape) <= _FLAT_NUMEL else _SIZES[: len(shape)]
        start = torch.ones(small, dtype=dtype, device=self._device)
        try:
            state = self._step(start)
        except Exception:  # noqa: BLE001  some make their state in the constructor and count on it
            state = self._step(start, with_state=True)
        scale = {prod(small): prod(shape), **dict(zip(small, shape, strict=True))}
        return sum(value.element_size() * prod(scale.get(size, size) for size in value.shape) for value in state)

    @uncompiled
    def _step(self, start: Tensor, *, with_state: bool = False) -> list[Tensor]:
        """The state after some steps."""
        param = nn.Parameter(start)
        probe = copy_with(self._optimizer, self._group, [[param]], set(), with_state=with_state)
        for _ in range(2):  # some begin late
            param.grad = torch.ones_like(start)
            step_without_hooks(probe)
        leaves: list[Any] = tree_leaves(dict(probe.state.get(param, {})))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel() > 1]
