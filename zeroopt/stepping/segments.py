"""State and step of segments that one fused kernel steps together, whoever owns the memory that they lie in."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..own_storage import with_own_storage
from ..plan.params import ParamState
from ..streams import ReadByGraphs
from ..transfers import Uploaded
from .rules import FusedRule
from .step_counts import count_of, put_count, show_count

StateArray = tuple[Tensor, Tensor | None]
"""An array of state and, for 8-bit state, its scales; both 1-D."""


class FusedSegments(ABC):
    """Segments of one storage, and their state as an optimizer's `state` shows it.

    A segment gets the state that its group's options call for, and not before it is first stepped, as under torch.

    Args:
        leaves: for each segment the key of its state.
        group_of: for each segment the position of its param_group.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: FusedRule,
        storage: ops.Storage,
        leaves: Sequence[Tensor],
        group_of: Sequence[int],
        device: torch.device,
    ) -> None:
        self._optimizer = optimizer
        self._rule = rule
        self._storage = storage
        self._leaves = leaves
        self._group_of = group_of
        self._device = device
        self._active, self._groups = Uploaded(device), Uploaded(device)
        self._steps = torch.zeros(2, len(leaves), dtype=torch.float32, device=device)  # see StepKernel
        # torch's SGD has no step count in its state, but random numbers depend on it.
        self._shows_step = rule.has_step or storage.is_stochastic
        self._table: ops.SegmentTable | None = None  # of the arrays that there are
        self._read_by_graphs = ReadByGraphs()
        self._names: list[tuple[str, ...] | None] = [None] * len(leaves)  # of the state that is shown
        self._begun = [False] * len(leaves)  # whether a segment ever had state
        self._shown: list[tuple[ParamState, list[Any]] | None] = [None] * len(
            leaves
        )  # in `state`, and what was in that
        for i, leaf in enumerate(leaves):
            if leaf in optimizer.state:
                self._load(i, optimizer.state[leaf])

    @abstractmethod
    def _arrays(self, i: int) -> ops.SegmentArrays:
        """A segment without its state."""

    @abstractmethod
    def _state(self, i: int, name: str) -> StateArray | None:
        """A segment's array of state, if it has been made."""

    @abstractmethod
    def _make_state(self, i: int, name: str, dtype: torch.dtype) -> StateArray:
        """Make an array of state, of zeros."""

    def _show(self, i: int, array: Tensor) -> Tensor:
        """An array of state as the optimizer's `state` shows it."""
        del i
        return array

    def _flatten(self, i: int, value: Tensor) -> Tensor:
        """The inverse of `_show`, for any tensor."""
        del i
        return value

    def step(
        self,
        active: Tensor,
        groups: Tensor,
        control: ops.StepControl,
        grads: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Step the active segments.

        Args:
            active: uint8 [n], on the CPU.
            groups: the kernel's table of hyper-parameters, on the CPU.
            grads: where gradients lie elsewhere than in the step before.
        """
        in_use = [self._rule.names_in_use(group) for group in self._optimizer.param_groups]
        for i, flag in enumerate(active.tolist()):
            names = in_use[self._group_of[i]]
            if flag and names != self._names[i]:
                self._expose(i, names)
        if not active.any():  # nothing to step, and perhaps no state yet to step it with
            return
        if self._table is None:
            self._table = self._make_table()
        if grads is not None:
            self._table.set_grads(grads)
        self._read_by_graphs.note(self._table, self._device)
        self._rule.kernel(
            self._table,
            active=self._active.hold(active),
            steps=self._steps,
            groups=self._groups.hold(groups),
            control=control,
            active_on_host=active,
        )

    def still_shows(self) -> bool:
        """Whether the optimizer's `state` holds what was put there, and nobody has replaced any of it."""
        state = self._optimizer.state
        for leaf, shown in zip(self._leaves, self._shown, strict=True):
            entry = state.get(leaf)
            if shown is None:
                if entry:
                    return False
            elif (
                entry is not shown[0]
                or len(entry) != len(shown[1])
                or not all(map(operator.is_, entry.values(), shown[1]))
            ):
                return False
        return True

    def _make_table(self) -> ops.SegmentTable:
        segments = []
        for i in range(len(self._leaves)):
            arrays = self._arrays(i)
            made = [self._state(i, name) for name in self._rule.kernel.states]
            states = [None if pair is None else pair[0] for pair in made]
            scales = [None if pair is None else pair[1] for pair in made] if self._storage.has_scales else []
            segments.append(replace(arrays, states=states, scales=scales))
        return ops.SegmentTable(self._storage, segments, self._rule.kernel.signed)

    def _expose(self, i: int, names: tuple[str, ...]) -> None:
        """Show a segment's state in the optimizer's `state`, as it is in memory, once the segment has any."""
        fresh = bool(names) and not self._begun[i]
        initial = self._rule.initial_value(self._optimizer.param_groups[self._group_of[i]])
        entry: ParamState = self._extra_state(i)
        for name in names:
            array, scales = self._ensure(i, name)
            if fresh and initial:
                self._write(i, name, torch.full((array.numel(),), initial, dtype=torch.float32, device=self._device))
            entry[name] = self._show(i, array)
            if scales is not None:
                entry[name + ops.SCALE_SUFFIX] = with_own_storage(scales)
        if fresh and not self._rule.has_step:
            self._steps[:, i] = 0  # SGD's state begins when momentum is turned on, not at its first step
        self._names[i] = names
        self._begun[i] |= bool(names)
        if self._shows_step:
            entry = {"step": show_count(self._steps, i), **entry}
        if entry:
            self._optimizer.state[self._leaves[i]] = entry
            self._shown[i] = entry, list(entry.values())

    def _extra_state(self, i: int) -> ParamState:
        """What else the optimizer's `state` shows of a segment."""
        del i
        return {}

    def _load(self, i: int, entry: ParamState) -> None:
        """Take over state that came from a load or from before wrapping."""
        names = tuple(name for name in self._rule.kernel.states if isinstance(entry.get(name), Tensor))
        self._begun[i] = bool(names)
        for name in names:
            self._write(i, name, self._flatten(i, entry[name]), entry.get(name + ops.SCALE_SUFFIX))
        self._expose(i, names)
        put_count(self._steps, i, count_of(entry.get("step", bool(names))))

    def _write(self, i: int, name: str, values: Tensor, stored_scales: Tensor | None = None) -> None:
        """Set a segment's state, from what it is stored as, or from plain numbers, which may come with the scales of the codes
        that they were decoded from."""
        array, scales = self._ensure(i, name)
        is_decoded = values.is_floating_point()
        if scales is not None and stored_scales is not None and not is_decoded:
            scales.copy_(stored_scales)
            array.copy_(values)
            return
        if stored_scales is not None and not is_decoded:
            codes, values = values.contiguous(), torch.empty(values.numel(), dtype=torch.float32, device=values.device)
            ops.dequantize(codes, stored_scales.to(codes.device), values)
        if scales is None:
            array.copy_(values)
            return
        values = values.to(self._device, torch.float32).contiguous()
        if stored_scales is not None and is_decoded:
            ops.requantize(values, stored_scales, array, scales)
        else:
            ops.quantize(values, array, scales)

    def _ensure(self, i: int, name: str) -> StateArray:
        made = self._state(i, name)
        if made is None:
            self._table = None
            kernel = self._rule.kernel
            signed = kernel.signed[kernel.states.index(name)]
            made = self._make_state(i, name, self._storage.dtype_of_state(signed=signed))
        return made
