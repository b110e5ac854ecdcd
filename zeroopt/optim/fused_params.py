"""Whole parameters and their state, each in memory of its own, stepped in one call."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.checks import lies_as
from ..options.precision import join_master, round_master, split_master
from ..plan.params import ParamState
from ..stepping.rules import FusedRule
from ..stepping.segments import FusedSegments, StateArray

Places = dict[int, tuple[int, Tensor]]
"""By position in the optimizer, counted over all groups: the group and the parameter."""


class FusedParams(FusedSegments):
    """Whole parameters of one kind, each with state of its own."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: FusedRule,
        storage: ops.Storage,
        places: Places,
    ) -> None:
        self.places = places
        self._positions = list(places)
        self._params = [param for _, param in places.values()]
        self._addresses = [param.data_ptr() for param in self._params]
        self._versions = [param._version for param in self._params]
        self._states: list[dict[str, StateArray]] = [{} for _ in self._params]
        self._masters = [self._master(storage, param, optimizer.state.get(param, {})) for param in self._params]
        group_of = [group for group, _ in places.values()]
        super().__init__(optimizer, rule, storage, self._params, group_of, self._params[0].device)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedParams:
        return self  # a copied optimizer makes its own, for this one is not `is_current` there

    def is_current(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], group_of: Sequence[int]) -> bool:
        """Whether this optimizer made it, and its parameters and their state are still where they were.

        Args:
            params, group_of: all parameters that the optimizer has now, and the group of each.
        """
        return (
            self._optimizer is optimizer
            and self._positions[-1] < len(params)
            and all(map(operator.is_, self._params, (params[position] for position in self._positions)))
            and [group_of[position] for position in self._positions] == list(self._group_of)
            and list(map(Tensor.data_ptr, self._params)) == self._addresses
            and self.still_shows()
        )

    def step_gradients(self, groups: Tensor, control: ops.StepControl) -> None:
        """Step the parameters that have a gradient."""
        grads = [self._gradient(i) for i in range(len(self._params))]
        active = torch.tensor([grad is not None for grad in grads], dtype=torch.uint8, device="cpu")
        self._take_up_writes()
        self.step(active, groups, control, grads)
        for param, grad in zip(self._params, grads, strict=True):
            if grad is not None:  # autograd has to know, as kernels write behind its back
                torch.autograd.graph.increment_version(param)
        self._versions = [param._version for param in self._params]

    def _take_up_writes(self) -> None:
        """Let masters follow parameters that were written in place since the last step."""
        for i, (param, version) in enumerate(zip(self._params, self._versions, strict=True)):
            master = self._masters[i]
            if param._version != version and master is not None and master.dtype is torch.float32:
                flat = self._flatten(i, param.detach())
                master.copy_(torch.where(round_master(master, param.dtype) == flat, master, flat.float()))

    def _gradient(self, i: int) -> Tensor | None:
        param = self._params[i]
        grad = param.grad
        if grad is None or grad.dtype is not self._storage.grad_dtype:  # of another kind this time
            return None
        if grad.is_neg():
            grad = grad.resolve_neg()
        return grad if lies_as(grad, param.stride()) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)

    def _arrays(self, i: int) -> ops.SegmentArrays:
        param = self._flatten(i, self._params[i].detach())
        return ops.SegmentArrays(param, master=self._masters[i], group=self._group_of[i], key=self._positions[i])

    def _state(self, i: int, name: str) -> StateArray | None:
        return self._states[i].get(name)

    def _make_state(self, i: int, name: str, dtype: torch.dtype) -> StateArray:
        numel = self._params[i].numel()
        scales = (
            torch.zeros(ops.num_blocks(numel), dtype=torch.float32, device=self._device)
            if self._storage.has_scales
            else None
        )
        made = self._states[i][name] = torch.zeros(numel, dtype=dtype, device=self._device), scales
        return made

    def _show(self, i: int, array: Tensor) -> Tensor:
        return array.as_strided(self._params[i].shape, self._params[i].stride())

    def _flatten(self, i: int, value: Tensor) -> Tensor:
        return _flat(value, self._params[i])

    def _extra_state(self, i: int) -> ParamState:
        master = self._masters[i]
        return {} if master is None else {_master_name(master): self._show(i, master)}

    def _master(self, storage: ops.Storage, param: Tensor, entry: ParamState) -> Tensor | None:
        """What completes a parameter, 1-D: from its state, of either kind, unless the parameter was written since; else from
        itself."""
        dtype = storage.master_dtype
        if dtype is None:
            return None
        flat = _flat(param.detach(), param)
        if "master_param" in entry:
            full = _flat(entry["master_param"].to(param.device), param)
            full = torch.where(round_master(full, param.dtype) == flat, full, flat.float())
        elif _is_remainder(entry.get("remainder")) and param.dtype is torch.bfloat16:
            full = join_master(flat, _flat(entry["remainder"].to(param.device), param))
        else:
            full = flat.float()
        return full.clone() if dtype is torch.float32 else split_master(full)[1]


def _is_remainder(value: Any) -> bool:
    """Whether torch's `load_state_dict` has not cast it to the parameter's dtype meanwhile."""
    return isinstance(value, Tensor) and value.dtype is torch.int16


def _flat(value: Tensor, param: Tensor) -> Tensor:
    """Elements in the order in which the parameter's lie in memory, 1-D."""
    if not lies_as(value, param.stride()):
        value = torch.empty_like(param, dtype=value.dtype).copy_(value)
    return value.as_strided((param.numel(),), (1,))


def _master_name(master: Tensor) -> str:
    return "master_param" if master.dtype is torch.float32 else "remainder"
