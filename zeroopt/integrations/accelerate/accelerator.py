"""An Accelerator whose `prepare` wraps with zeroopt."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn

from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from ...wrap import wrap
from .models import AwaitingModel, PreparedModel, prepare_again, prepared_from, prepared_with
from .optimizers import PreparedOptimizer, plain_optimizer


class ZeroMixin:
    """Methods that go before those of an Accelerator.

    A model and its optimizers may come in one call of `prepare`, or one after the other, in any order: each waits for the other in
    the object that `prepare` has given out for it, and that object becomes what `zeroopt.wrap` returns.

    Attributes:
        zeroopt_options: for `zeroopt.wrap`.
    """

    zeroopt_options: dict[str, Any]
    _models: list[nn.Module]
    _optimizers: list[AcceleratedOptimizer]

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """As that of Accelerate, with zeroopt in the place of DistributedDataParallel. Collective, where it completes a pair.

        Returns:
            A `PreparedModel`; the model itself with `evaluation_mode`, and where none of its parameters requires gradients.
        """
        place = super().prepare_model  # type: ignore[misc]  # on the device, under autocast
        if evaluation_mode or isinstance(model, ZeroDataParallel):
            return place(model, device_placement, evaluation_mode=True)  # type: ignore[no-any-return]
        ready = place(model, device_placement, evaluation_mode=True)
        if not any(param.requires_grad for param in ready.parameters()):
            return ready  # type: ignore[no-any-return]
        prepared = prepared_from(ready) or AwaitingModel(ready)
        self._models[:] = [one for one in self._models if one is not ready and one is not prepared]
        self._models.append(prepared)
        for optimizer in self._optimizers:
            if isinstance(optimizer, PreparedOptimizer) and optimizer.awaits_model:
                self._pair(optimizer)
        return prepared

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """As that of Accelerate, around the optimizer that `zeroopt.wrap` returns. Collective, where it completes a pair."""
        place = super().prepare_optimizer  # type: ignore[misc]
        prepared = place(
            optimizer, device_placement=False if isinstance(optimizer, ZeroOptimizer) else device_placement
        )
        if type(prepared) is AcceleratedOptimizer:
            prepared.__class__ = PreparedOptimizer
        if prepared.awaits_model:
            try:
                self._pair(prepared)
            except Exception:
                self._optimizers.remove(prepared)
                raise
        return prepared

    def _pair(self, optimizer: PreparedOptimizer) -> None:
        """Wrap an optimizer and the model that has its parameters, if that is there. Collective then."""
        plain = plain_optimizer(optimizer)
        params = {*chain.from_iterable(group["params"] for group in plain.param_groups)}
        model = prepared_with(params)
        if model is None:
            return
        if not params.isdisjoint(_trained_params(model)):
            self._forget(model)
            model = prepare_again(model)
        if isinstance(model, AwaitingModel):
            wrapped, wrapped_optimizer = wrap(model.module, plain, **self.zeroopt_options)
            model.become(wrapped)
        else:
            further = {name: value for name, value in self.zeroopt_options.items() if name != "features"}
            _, wrapped_optimizer = wrap(model, plain, **further)
        optimizer.become(wrapped_optimizer)
        if model not in self._models:
            self._models.append(model)

    def _forget(self, model: PreparedModel) -> None:
        """The optimizers of a model are about to be given up."""
        gone = {*map(id, model.optimizers)}
        self._optimizers[:] = [one for one in self._optimizers if id(plain_optimizer(one)) not in gone]

    def prepare_scheduler(self, scheduler: Any) -> AcceleratedScheduler:
        """As that of Accelerate. The scheduler may have been made for the optimizer before or after `prepare`."""
        prepared = super().prepare_scheduler(scheduler)  # type: ignore[misc]
        groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
        for optimizer in self._optimizers:
            if optimizer.param_groups is groups:  # those of the wrapped and of the plain optimizer are the same list
                prepared.optimizers = [optimizer]
        return prepared

    def clip_grad_norm_(
        self, parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2
    ) -> Tensor | None:
        """As that of Accelerate; where these are all parameters of one optimizer, in the same pass as its step."""
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        wanted = {param for param in parameters if param.requires_grad}
        for optimizer in map(plain_optimizer, self._optimizers):
            if isinstance(optimizer, ZeroOptimizer) and self.sync_gradients and wanted == _params_of(optimizer):  # type: ignore[attr-defined]
                self.unscale_gradients()  # type: ignore[attr-defined]
                return optimizer.clip_grad_norm_(max_norm, norm_type)
        return super().clip_grad_norm_(parameters, max_norm, norm_type)  # type: ignore[misc,no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self).__bases__[-1],), vars(self)


def _params_of(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    """Those that require gradients."""
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return {param for param in params if param.requires_grad}


def _trained_params(model: PreparedModel) -> set[Tensor]:
    groups = chain.from_iterable(optimizer.param_groups for optimizer in model.optimizers)
    return {*chain.from_iterable(group["params"] for group in groups)}


class ZeroAccelerator(ZeroMixin, Accelerator):  # type: ignore[misc]
    """What `enable` makes of an Accelerator."""


@cache
def with_zeroopt(plain: type) -> type:
    """The class that an Accelerator of some class becomes."""
    if plain is Accelerator:
        return ZeroAccelerator
    return type(f"Zero{plain.__name__}", (ZeroMixin, plain), {"__doc__": plain.__doc__, "__module__": plain.__module__})


def _rebuild(plain: type) -> Any:
    return object.__new__(with_zeroopt(plain))
