"""What the optimizers of this package share: parameters of any kind stepped in as few calls as there are kinds."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..bucket import ParamState
from ..config import MASTER_WEIGHTS
from ..errors import ConfigError, NotSupportedError, ZeroOptError
from ..fused_rules import FusedRule
from ..fused_segments import FusedSegments, StateArray
from ..ops.checks import is_dense
from ..precision import join_master, round_master, split_master


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose step is one call of a fused kernel for all parameters of a device and dtype. Not collective.

    Parameters are dense tensors of float32, bfloat16 or float16 on the CPU or on CUDA devices, also mixed; gradients have the
    dtype of their parameter. `state_dict()` has torch's keys, and beyond them "master_param" (float32) or "remainder" (int16)
    of 16-bit parameters, and with 8-bit state its scales ("exp_avg_scale" and so on). `load_state_dict()` takes these or those
    of the torch optimizer. `torch.amp.GradScaler` leaves unscaling and skipping to the kernel. To shard the state, give
    the optimizer to `zeroopt.wrap`, and the options below to it.

    Args:
        master_weights: of 16-bit parameters: "float32", "remainder" or "none"; see `zeroopt.ops.Storage`.
        state_dtype: of the moments: torch.float32, torch.bfloat16 or torch.int8.
        seed: of stochastic rounding.

    Raises:
        ConfigError: an option that does not exist, or not for the parameters given.
        NotSupportedError: differentiable=True, sparse gradients, or parameters of other dtypes.
    """

    fused_rule: ClassVar[FusedRule]
    _step_supports_amp_scaling = True

    def __init__(
        self,
        *args: Any,
        master_weights: str = "float32",
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.master_weights = master_weights
        self.state_dtype = state_dtype
        self.seed = seed
        self._batches: dict[_Kind, FusedParams] = {}
        if master_weights not in MASTER_WEIGHTS:
            raise ConfigError(
                f"expected master_weights to be one of {', '.join(MASTER_WEIGHTS)}, got {master_weights!r}"
            )
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step all parameters that have a gradient.

        Args:
            closure: recomputes the loss, with backward; called once, before the step.

        Returns:
            What the closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        places = self._places_with_gradients()
        groups = torch.tensor([self.fused_rule.hyper_row(group) for group in self.param_groups], dtype=torch.float64)
        for kind, with_gradients in places.items():
            # torch.amp.GradScaler sets these two for the duration of a step.
            scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            control = ops.StepControl(
                grad_scale=None if scale is None else scale.to(kind[0]),
                found_inf=None if found_inf is None else found_inf.to(kind[0]),
                seed=self.seed,
            )
            self._batch(kind, with_gradients).step_gradients(groups, control)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as `torch.optim.Optimizer.add_param_group`.

        Raises:
            NotSupportedError, ConfigError: as the constructor. The group has not been added.
        """
        super().add_param_group(param_group)
        self._batches.clear()
        try:
            self._check_group(self.param_groups[-1])
        except ZeroOptError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict()` gave, here or of the torch optimizer. Nothing is rounded to the parameters' dtype.

        Raises:
            ValueError: the groups do not fit, as torch.
        """
        given = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, given)
            given = given if changed is None else changed
        with self._without_load_hooks():
            super().load_state_dict(given)
        params = [param for group in self.param_groups for param in group["params"]]
        positions = [position for group in given["param_groups"] for position in group["params"]]
        for param, position in zip(params, positions, strict=True):
            if position in given["state"]:  # torch has cast it
                saved = given["state"][position]
                self.state[param] = {name: _copy_to(value, param.device) for name, value in saved.items()}
        self._batches.clear()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @contextmanager
    def _without_load_hooks(self) -> Iterator[None]:
        """They have been called, or will be when all is in place."""
        names = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
        hooks = [getattr(self, name) for name in names]
        for name in names:
            setattr(self, name, OrderedDict())
        try:
            yield
        finally:
            for name, registered in zip(names, hooks, strict=True):
                setattr(self, name, registered)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("master_weights", "state_dtype", "seed")}
        state: dict[str, Any] = super().__getstate__()
        return {**state, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._batches = {}
        super().__setstate__(state)

    @property
    def has_default_precision(self) -> bool:
        """Whether neither `master_weights` nor `state_dtype` was set."""
        return self.master_weights == "float32" and self.state_dtype is torch.float32

    def _check_group(self, group: dict[str, Any]) -> None:
        if group.get("differentiable"):
            raise NotSupportedError("fused kernels cannot be differentiated through; use torch.optim")
        for number, param in enumerate(group["params"]):
            self._storage(param.dtype, param.dtype)
            if not is_dense(param):
                raise NotSupportedError(
                    f"expected parameters that are dense in memory, but parameter {number} of its group has strides "
                    f"{param.stride()} for shape {list(param.shape)}; make it contiguous()"
                )

    def _storage(self, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> ops.Storage:
        weights = "float32" if param_dtype is torch.float32 else self.master_weights
        try:
            return ops.Storage(param_dtype, weights, grad_dtype, self.state_dtype)
        except ConfigError as error:
            if param_dtype in (torch.float32, torch.bfloat16, torch.float16):
                raise
            raise NotSupportedError(
                f"there are no fused kernels for parameters of {param_dtype}; use torch.optim"
            ) from error

    def _places_with_gradients(self) -> dict[_Kind, Places]:
        """The parameters that have a gradient, by what can be stepped in one call."""
        result: defaultdict[_Kind, Places] = defaultdict(dict)
        position = 0
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                grad = param.grad
                if grad is not None and param.numel():
                    if grad.layout is not torch.strided:
                        raise NotSupportedError(
                            f"parameter {position} has a sparse gradient; fused kernels take dense ones"
                        )
                    result[param.device, param.dtype, grad.dtype][position] = (number, param)
                position += 1
        return result

    def _batch(self, kind: _Kind, places: Places) -> FusedParams:
        """The batch that steps these parameters, and perhaps others that have no gradient this time."""
        batch = self._batches.get(kind)
        if batch is not None and batch.is_current(self):
            if batch.covers(places):
                return batch
            places = {**batch.places, **places}
        _, param_dtype, grad_dtype = kind
        storage = self._storage(param_dtype, grad_dtype)
        batch = self._batches[kind] = FusedParams(self, self.fused_rule, storage, dict(sorted(places.items())))
        return batch


Places = dict[int, tuple[int, Tensor]]
"""By position in the optimizer, counted over all groups: the group and the parameter."""


_Kind = tuple[torch.device, torch.dtype, torch.dtype]
"""What parameters of one call have in common: their device, their dtype, and that of their gradients."""


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

    def is_current(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimizer made it, and parameters and state are still where they were."""
        in_place = all(p.data_ptr() == address for p, address in zip(self._params, self._addresses, strict=True))
        return self._optimizer is optimizer and in_place and self.still_shows()

    def covers(self, places: Places) -> bool:
        """Whether it has all of these parameters."""
        mine = self.places
        return all(position in mine and mine[position][1] is param for position, (_, param) in places.items())

    def step_gradients(self, groups: Tensor, control: ops.StepControl) -> None:
        """Step the parameters that have a gradient."""
        grads = [self._gradient(i) for i in range(len(self._params))]
        active = torch.tensor([grad is not None for grad in grads], dtype=torch.uint8)
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
        return grad if grad.stride() == param.stride() else torch.empty_like(param, dtype=grad.dtype).copy_(grad)

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
        elif "remainder" in entry and param.dtype is torch.bfloat16:
            full = join_master(flat, _flat(entry["remainder"].to(param.device), param))
        else:
            full = flat.float()
        return full.clone() if dtype is torch.float32 else split_master(full)[1]


def _flat(value: Tensor, param: Tensor) -> Tensor:
    """Elements in the order in which the parameter's lie in memory, 1-D."""
    if value.stride() != param.stride():
        value = torch.empty_like(param, dtype=value.dtype).copy_(value)
    return value.as_strided((param.numel(),), (1,))


def _master_name(master: Tensor) -> str:
    return "master_param" if master.dtype is torch.float32 else "remainder"


def _copy_to(value: Any, device: torch.device) -> Any:
    # A step count stays where torch keeps it, on the CPU.
    return value.to(device if value.dim() else value.device, copy=True) if isinstance(value, Tensor) else value
