"""What `prepare` makes of a model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...admission.candidates import mark_wrapped
from ...errors import StateError
from ...module import ZeroDataParallel
from ...unwrap import unwrap

# In the order of preparing, which is that of all ranks.
_prepared: weakref.WeakValueDictionary[int, PreparedModel] = weakref.WeakValueDictionary()
_numbers = count()

_UNPAIRED = (
    "this model has been prepared, and its optimizer has not: give both to accelerator.prepare() before training, "
    "together or one after the other; evaluate in eval() or within torch.no_grad(), and give a model that is never "
    "trained to accelerator.prepare_model(model, evaluation_mode=True)"
)


class PreparedModel(ZeroDataParallel, nn.DataParallel):  # type: ignore[type-arg]
    """What `zeroopt.wrap` returned, in the object that `prepare` had given out.

    It counts as a `torch.nn.DataParallel`, of which it uses nothing, because that is one of the classes in which Accelerate's
    `extract_model_from_parallel`, and with it transformers, peft and trl, look for the model itself, in `.module`. (As a
    DistributedDataParallel it would be asked for its reducer.)
    """


class AwaitingModel(PreparedModel):
    """A prepared model whose optimizer has not been prepared yet. Evaluates as it is, and refuses to train."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__["module"] = module
        self.__dict__["_modules"] = module._modules
        self.training = module.training
        self._watched: dict[Tensor, RemovableHandle] = {}
        vars(self)["_is_accelerate_prepared"] = True  # by which Accelerate knows it
        _prepared[next(_numbers)] = self

    def become(self, wrapped: ZeroDataParallel) -> None:
        """From now on be the model that `zeroopt.wrap` has made of `.module`."""
        del self._watched
        common = vars(nn.Module()).keys()
        vars(self).update({name: value for name, value in vars(wrapped).items() if name not in common})
        self.__class__ = PreparedModel  # type: ignore[assignment]
        mark_wrapped(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            StateError: it is to be trained, and nothing would average its gradients. In eval() backward raises it, where it
                reaches a parameter that requires gradients.
        """
        if torch.is_grad_enabled():
            if self.training:
                raise StateError(_UNPAIRED)
            self._refuse_gradients()
        return self.module(*args, **kwargs)

    def _refuse_gradients(self) -> None:
        """A model may be trained in eval(), too, so raise where a gradient reaches a parameter; gradients of inputs are fine."""
        myself = weakref.ref(self)

        def refuse(_: Tensor) -> None:
            if isinstance(myself(), AwaitingModel):
                raise StateError(_UNPAIRED)

        for param in self.module.parameters():
            if param.requires_grad and param not in self._watched:
                self._watched[param] = param.register_hook(refuse)  # type: ignore[no-untyped-call]

    def take_gradients(self) -> None:
        """Refuse none of them any more: it is about to be wrapped."""
        for hook in self._watched.values():
            hook.remove()
        self._watched.clear()

    @property
    def optimizers(self) -> tuple[()]:
        """None yet."""
        return ()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Nothing is synchronized yet."""
        yield

    @contextmanager
    def write_parameters(self) -> Iterator[bool]:
        """Each rank has parameters of its own yet."""
        yield True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """`module.zero_grad()`."""
        self.module.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """`module.load_state_dict()`."""
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.module._load_from_state_dict(*args)


def prepare_again(model: PreparedModel) -> AwaitingModel:
    """Undo `zeroopt.wrap` for a model that goes on with other optimizers; the object stays the same. Collective.

    Its optimizers, and their state, are given up.
    """
    module = unwrap(model)
    model.__class__ = AwaitingModel
    model.__init__(module)  # type: ignore[misc]
    assert isinstance(model, AwaitingModel)
    return model


def prepared_by_hand(model: ZeroDataParallel) -> PreparedModel:
    """What the user's own `zeroopt.wrap` has returned, from now on as if `prepare` had."""
    if not isinstance(model, PreparedModel):
        model.__class__ = PreparedModel
        _prepared[next(_numbers)] = model  # type: ignore[assignment]
    return model  # type: ignore[return-value]


def prepared_from(module: nn.Module) -> PreparedModel | None:
    """What an earlier `prepare` has made of a model, if anybody still has it."""
    return next((model for model in _still_prepared() if model.module is module), None)


def prepared_with(params: Iterable[Tensor]) -> PreparedModel | None:
    """The prepared model that has one of these parameters, if there is one."""
    wanted = {*map(id, params)}
    return next(
        (model for model in _still_prepared() if any(id(param) in wanted for param in model.parameters())), None
    )


def _still_prepared() -> list[PreparedModel]:
    """The last one first, for an earlier one may only wait to be collected; without those that `zeroopt.unwrap` has made something
    else of."""
    return [model for _, model in sorted(_prepared.items(), reverse=True) if isinstance(model, PreparedModel)]
