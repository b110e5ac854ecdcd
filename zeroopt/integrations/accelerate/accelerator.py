"""An Accelerator whose methods know of zeroopt."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DynamoBackend, broadcast_object_list
from accelerate.utils.other import compile_regions_deepspeed, is_compiled_module
from torch import Tensor, nn

from ...errors import ConfigError
from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from ...unwrap import UnwrappedModel, UnwrappedOptimizer
from ..wrap_options import has_meta
from .kinds import check_kind
from .models import AwaitingModel, prepared_by_hand, prepared_from
from .optimizers import PreparedOptimizer, plain_optimizer
from .options import choose
from .pairing import pair, params_of
from .saving import load_models, newest_whole, remove_former, save_models, wrapped_models
from .uneven import batches_made_even, model_to_join


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
    step: int
    _states_of_wrapped: list[Any] | None = None  # while they are saved, those that Accelerate has asked for

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `enable` with no options does, for whoever makes an instance of the class itself.

        Raises:
            NotSupportedError, StateError: as `enable`.
        """
        super().__init__(*args, **kwargs)
        check_kind(self)
        self.zeroopt_options = choose({"stage": 2}, self.ddp_handler)  # type: ignore[attr-defined]

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """As that of Accelerate, with zeroopt in the place of DistributedDataParallel. Collective, where it completes a pair.

        What is to be compiled is compiled in place, within what zeroopt puts around it, so that a model that is evaluated first is the
        one that is trained later. A model on the meta device stays there: it is made when its optimizer comes.

        Returns:
            A `PreparedModel`; the model itself with `evaluation_mode`, and where none of its parameters requires gradients.
        """
        place = super().prepare_model  # type: ignore[misc]  # on the device, under autocast
        if isinstance(model, ZeroDataParallel):
            # Where its parameters lie, they have to stay.
            return place(prepared_by_hand(model), device_placement=False, evaluation_mode=True)  # type: ignore[no-any-return]
        if not evaluation_mode:
            self._forget_unwrapped()
            if has_meta(model):
                device_placement = False
        with self._compiling_later():
            model = place(model, device_placement, evaluation_mode=True)
        self._compile(model)
        if evaluation_mode or not any(param.requires_grad for param in model.parameters()):
            return model
        prepared = prepared_from(model) or AwaitingModel(model)
        self._models[:] = [one for one in self._models if one is not model]
        self._take_up(prepared)
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
        """Wrap it and its model, if that has been prepared. Collective then."""
        model = pair(optimizer, self.zeroopt_options, self.device)  # type: ignore[attr-defined]
        if model is not None:
            self._forget_unwrapped()  # optimizers that this one has taken the place of
            self._take_up(model)

    def _take_up(self, model: nn.Module) -> None:
        if not any(one is model for one in self._models):
            self._models.append(model)

    def _forget_unwrapped(self) -> None:
        gone = UnwrappedModel, UnwrappedOptimizer
        self._models[:] = [one for one in self._models if not isinstance(one, gone)]
        self._optimizers[:] = [one for one in self._optimizers if not isinstance(plain_optimizer(one), gone)]

    @contextmanager
    def _compiling_later(self) -> Iterator[None]:
        plugin = self.state.dynamo_plugin  # type: ignore[attr-defined]
        backend, plugin.backend = plugin.backend, DynamoBackend.NO
        try:
            yield
        finally:
            plugin.backend = backend

    def _compile(self, model: nn.Module) -> None:
        plugin = self.state.dynamo_plugin  # type: ignore[attr-defined]
        is_compiled = is_compiled_module(model) or model._compiled_call_impl is not None
        if plugin.backend == DynamoBackend.NO or is_compiled:
            return
        if plugin.use_regional_compilation:
            compile_regions_deepspeed(model, **plugin.to_kwargs())  # of any model, in place
        else:
            model.compile(**plugin.to_kwargs())

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
        """As that of Accelerate; where these are all parameters of one optimizer, in the same pass as its step. Collective."""
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        wanted = {param for param in parameters if param.requires_grad}
        for optimizer in map(plain_optimizer, self._optimizers):
            if isinstance(optimizer, ZeroOptimizer) and self.sync_gradients and wanted == params_of(optimizer):  # type: ignore[attr-defined]
                self.unscale_gradients()  # type: ignore[attr-defined]
                return optimizer.clip_grad_norm_(max_norm, norm_type)
        return super().clip_grad_norm_(parameters, max_norm, norm_type)  # type: ignore[misc,no-any-return]

    @contextmanager
    def join_uneven_inputs(self, joinables: Sequence[Any], even_batches: bool | None = None) -> Iterator[None]:
        """As that of Accelerate, on the CPU too; for a wrapped model, `ZeroDataParallel.join`. Collective.

        Raises:
            ConfigError: there is something else beside a wrapped model and its optimizers.
        """
        model = model_to_join(joinables)
        if model is None:
            with super().join_uneven_inputs(joinables, even_batches):  # type: ignore[misc]
                yield
            return
        even = self.even_batches if even_batches is None else even_batches  # type: ignore[attr-defined]
        with batches_made_even(self._dataloaders, even_batches), model.join(enable=not even):  # type: ignore[attr-defined]
            yield

    @staticmethod
    @contextmanager
    def trigger_sync_in_backward(model: nn.Module) -> Iterator[None]:
        """As that of Accelerate: a backward within it is one outside of `no_sync`, wherever it is called. Collective then."""
        if not wrapped_models([model]):
            with Accelerator.trigger_sync_in_backward(model):
                yield
            return
        assert isinstance(model, ZeroDataParallel)
        reducer = model.replica.reducer
        before, reducer.sync = reducer.sync, True
        try:
            yield
        finally:
            reducer.sync = before

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> Any:
        """As that of Accelerate. Not collective: every rank holds all parameters."""
        state = super().get_state_dict(model, unwrap)  # type: ignore[misc]
        if self._states_of_wrapped is not None and wrapped_models([model]):
            self._states_of_wrapped.append(state)
        return state

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        trained_only: bool = False,
        **save_model_func_kwargs: Any,
    ) -> Path:
        """As that of Accelerate; wrapped models and their optimizers go to `zeroopt_0`, … in the folder, by
        `zeroopt.checkpoint.save`. Collective, and all ranks have to see the folder.

        Of an earlier checkpoint in the folder, with zeroopt or without, no model and no optimizer stays.

        Args:
            trained_only: of wrapped models, save only what their optimizers train.

        Raises:
            ConfigError: the project is to be saved on each node. Nothing has been written.
        """
        models = wrapped_models(self._models)
        if models and self.project_configuration.save_on_each_node:  # type: ignore[attr-defined]
            raise ConfigError(
                "with save_on_each_node checkpoints are on file systems that only some ranks see, and each rank's part of the state "
                "would be on one of them: leave it out of ProjectConfiguration, and save to a folder that all ranks see"
            )
        self._remove_former(output_dir, models)
        self._states_of_wrapped = []
        hook = self.register_save_state_pre_hook(self._leave_out_wrapped)  # type: ignore[attr-defined]  # the last one to be called
        optimizers = list(self._optimizers)
        try:
            self._leave_out_optimizers()
            folder = Path(super().save_state(output_dir, safe_serialization, **save_model_func_kwargs))  # type: ignore[misc]
        finally:
            self._optimizers[:] = optimizers
            self._states_of_wrapped = None
            hook.remove()
        save_models(folder, models, trained_only=trained_only)
        return folder

    def _remove_former(self, folder: str | os.PathLike[str] | None, models: list[ZeroDataParallel]) -> None:
        if folder is None or self.project_configuration.automatic_checkpoint_naming:  # type: ignore[attr-defined]
            return  # Accelerate makes a new one
        self.wait_for_everyone()  # type: ignore[attr-defined]  # some ranks may still be loading from it
        if self.is_main_process:  # type: ignore[attr-defined]
            remove_former(Path(folder), models)

    def _leave_out_wrapped(self, _: object, states: list[Any], folder: object) -> None:
        """Hooks of the user's have seen all of them, and may have taken some away."""
        states[:] = [one for one in states if not any(one is other for other in self._states_of_wrapped or ())]

    def _leave_out_optimizers(self) -> None:
        self._optimizers[:] = [one for one in self._optimizers if not isinstance(plain_optimizer(one), ZeroOptimizer)]

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        *,
        trained_only: bool = False,
        **load_model_func_kwargs: Any,
    ) -> None:
        """As that of Accelerate; what `save_state` has saved of wrapped models loads on any number of ranks. Collective.

        What was saved without zeroopt loads, too. Of the newest of the checkpoints that Accelerate has named, one that was not
        finished is passed over.

        Args:
            trained_only: of wrapped models, load only what their optimizers train.

        Raises:
            CheckpointError: a part that zeroopt has saved is missing or damaged, or of another model, or the folder holds what was
                saved without zeroopt beside it. Nothing has been changed.
        """
        models = wrapped_models(self._models)
        plain = sum(not isinstance(plain_optimizer(one), ZeroOptimizer) for one in self._optimizers)
        strict = load_model_func_kwargs.get("strict", True)

        def load(others: list[nn.Module], folder: str) -> None:
            if load_models(Path(folder), models, plain_optimizers=plain, strict=strict, trained_only=trained_only):
                others[:] = [one for one in others if not any(one is model for model in models)]
                self._leave_out_optimizers()

        hook = self.register_load_state_pre_hook(load)  # type: ignore[attr-defined]
        optimizers = list(self._optimizers)
        try:
            if input_dir is None and self.project_configuration.automatic_checkpoint_naming:  # type: ignore[attr-defined]
                input_dir = newest_whole(Path(self.project_dir) / "checkpoints", models, len(optimizers))  # type: ignore[attr-defined]
            super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)  # type: ignore[misc]
        finally:
            self._optimizers[:] = optimizers
            hook.remove()
        # It is in the file of a rank's random state, which ranks that have joined since then do not have.
        (self.step,) = broadcast_object_list([self.step])

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (vars(type(self)).get("_made_of", type(self)),), vars(self)


class ZeroAccelerator(ZeroMixin, Accelerator):  # type: ignore[misc]
    """What `enable` makes of an Accelerator."""


@cache
def with_zeroopt(plain: type) -> type:
    """The class that an Accelerator of some class becomes."""
    if plain is Accelerator:
        return ZeroAccelerator
    if issubclass(plain, ZeroMixin):
        return plain
    # Nobody can import it by name: copies and pickles make it anew.
    names = {"__doc__": plain.__doc__, "__module__": plain.__module__, "_made_of": plain}
    return type(f"Zero{plain.__name__}", (ZeroMixin, plain), names)


def _rebuild(plain: type) -> Any:
    return object.__new__(with_zeroopt(plain))
