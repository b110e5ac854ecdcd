"""What the optimizers of this package share: parameters of any kind stepped in as few calls as there are kinds."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError, NotSupportedError, ZeroOptError
from ..ops.checks import is_dense
from ..options.precision import MASTER_WEIGHTS
from ..plan.dtensors import is_distributed
from ..state.tiers import readable
from ..state.torch_releases import options_of
from ..stepping.rules import FusedRule
from ..stepping.step_counts import check_count, with_exact_counts
from .fused_params import FusedParams, Places

_Kind = tuple[torch.device, torch.dtype, torch.dtype]
"""What parameters of one call have in common: their device, their dtype, and that of their gradients."""


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose step is one call of a fused kernel for all parameters of a device and dtype. Not collective.

    Parameters are dense tensors of float32, bfloat16 or float16 on the CPU or on CUDA devices, also mixed; gradients have the
    dtype of their parameter. `state` has torch's keys, and beyond them "master_param" (float32) or "remainder" (int16) of 16-bit
    parameters, and with 8-bit state its scales ("exp_avg_scale" and so on); `state_dict()` has the same, but 8-bit moments as the
    float32 that they stand for. `load_state_dict()` takes that, or what the torch optimizer of any release since 2.0 saved. A float32 master follows what is written into its parameter in place or by loading it, but not what
    is written through `param.data`. `torch.amp.GradScaler` leaves unscaling and skipping to the kernel. To shard the state, give
    the optimizer to `zeroopt.wrap`, and the options below to it.

    Args:
        master_weights: of 16-bit parameters: "float32", "remainder" or "none"; see `zeroopt.ops.Storage`.
        state_dtype: of the moments: torch.float32, torch.bfloat16 or torch.int8 (codes with a scale for every 256 elements,
            which the largest of them sets; one that is not finite harms no other).
        seed: of stochastic rounding.

    Raises:
        ConfigError: an option that does not exist, or not for the parameters given.
        NotSupportedError: differentiable=True, sparse gradients, or parameters of other dtypes.
    """

    fused_rule: ClassVar[FusedRule]
    # Made anew from what is in the groups and in `state`.
    derived_attributes: ClassVar[frozenset[str]] = frozenset({"_batches"})
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

        Raises:
            NotSupportedError: a gradient is sparse, or a DTensor. Nothing has been stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # As they are now: groups may have been edited since the last step.
        params = [param for group in self.param_groups for param in group["params"]]
        group_of = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        kinds = _kinds_with_gradients(params, group_of)
        for kind, held in list(self._batches.items()):
            if kind not in kinds and not held.is_current(self, params, group_of):
                del self._batches[kind]  # it would keep state that parameters have left behind
        groups = torch.tensor(
            [self.fused_rule.hyper_row(group) for group in self.param_groups], dtype=torch.float64, device="cpu"
        )
        for kind, with_gradients in kinds.items():
            # torch.amp.GradScaler sets these two for the duration of a step.
            scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            control = ops.StepControl(
                grad_scale=None if scale is None else scale.to(kind[0]),
                found_inf=None if found_inf is None else found_inf.to(kind[0]),
                seed=self.seed,
            )
            self._batch(kind, with_gradients, params, group_of).step_gradients(groups, control)
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

    def state_dict(self) -> dict[str, Any]:
        """As torch's, which it loads into: live tensors, but for 8-bit moments, which are decoded to float32. Their scales stand
        beside them, so that here they come back bit for bit."""
        with self._without_hooks("state_dict_post"):
            result: dict[str, Any] = super().state_dict()
        result["state"] = {key: readable(entry) for key, entry in with_exact_counts(result["state"]).items()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict()` gave, here or of the torch optimizer. Nothing is rounded to the parameters' dtype, and by which
        of torch's implementations the saved optimizer computed ("fused", "capturable" and the like) is left aside.

        Raises:
            ValueError: the groups do not fit, as torch.
            StateError: a step count is none. Nothing has been changed.
        """
        given = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, given)
            given = given if changed is None else changed
        for key, entry in given["state"].items():
            check_count(str(key), entry, "the state dict")
        with self._without_hooks("load_state_dict_pre", "load_state_dict_post"):
            super().load_state_dict({**given, "param_groups": self._groups_to_load(given["param_groups"])})
        params = [param for group in self.param_groups for param in group["params"]]
        positions = [position for group in given["param_groups"] for position in group["params"]]
        for param, position in zip(params, positions, strict=True):
            if position in given["state"]:  # torch has cast it
                saved, cast = given["state"][position], self.state[param]
                self.state[param] = {
                    name: _copy_to(name, value, param.device) if isinstance(value, Tensor) else cast.get(name)
                    for name, value in saved.items()
                    if value is not None
                }
        self._batches.clear()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _groups_to_load(self, saved: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        if len(saved) != len(self.param_groups):
            return saved  # torch says so
        return [
            {**own, **options_of(group), "params": group["params"]}
            for own, group in zip(self.param_groups, saved, strict=True)
        ]

    @contextmanager
    def _without_hooks(self, *kinds: str) -> Iterator[None]:
        """They have been called, or will be when all is in place."""
        names = [f"_optimizer_{kind}_hooks" for kind in kinds]
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
        return {**state, "state": defaultdict(dict, with_exact_counts(state["state"])), **own}

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

    def _batch(self, kind: _Kind, places: Places, params: Sequence[Tensor], group_of: Sequence[int]) -> FusedParams:
        """The batch that steps the parameters in these places, and perhaps others that have no gradient this time."""
        batch = self._batches.get(kind)
        if batch is not None and batch.is_current(self, params, group_of):
            if places.keys() <= batch.places.keys():
                return batch
            places = {**batch.places, **places}
        _, param_dtype, grad_dtype = kind
        storage = self._storage(param_dtype, grad_dtype)
        batch = self._batches[kind] = FusedParams(self, self.fused_rule, storage, dict(sorted(places.items())))
        return batch


def _kinds_with_gradients(params: Sequence[Tensor], group_of: Sequence[int]) -> dict[_Kind, Places]:
    """The parameters that have a gradient, by what can be stepped in one call.

    Args:
        params, group_of: all parameters of an optimizer, and the group of each.
    """
    result: defaultdict[_Kind, Places] = defaultdict(dict)
    for position, (param, number) in enumerate(zip(params, group_of, strict=True)):
        grad = param.grad
        if grad is not None and param.numel():
            if type(grad) is not Tensor and is_distributed(grad):
                raise NotSupportedError(
                    f"parameter {position} is a DTensor, which fused kernels step where zeroopt.wrap trains it; use torch.optim "
                    "for those of FSDP and fully_shard"
                )
            if grad.layout is not torch.strided:
                raise NotSupportedError(f"parameter {position} has a sparse gradient; fused kernels take dense ones")
            result[param.device, param.dtype, grad.dtype][position] = (number, param)
    return result


def _copy_to(name: str, value: Tensor, device: torch.device) -> Tensor:
    if name == "step":  # one number, which in torch 2.0 could be of shape [1]
        value = value.reshape(())
    # A step count stays where torch keeps it, on the CPU.
    return value.to(device if value.dim() else value.device, copy=True)
