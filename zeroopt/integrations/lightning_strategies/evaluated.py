"""Modules that Fabric was given without an optimizer, to be evaluated: gradients that reach them are not averaged, and are refused."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ...errors import StateError

_refusals: dict[Tensor, RemovableHandle] = WeakTensorKeyDictionary()  # type: ignore[assignment]


def refuse_gradients(module: nn.Module) -> None:
    """Have a backward raise StateError, on each rank that runs it, when it gives a gradient to a parameter that can be trained."""
    for param in module.parameters():
        if param.requires_grad and param not in _refusals:
            _refusals[param] = param.register_post_accumulate_grad_hook(_refuse)  # type: ignore[no-untyped-call]


def allow_gradients(module: nn.Module) -> None:
    """Undo `refuse_gradients` for what a module has. Does nothing where that was not called."""
    for param in module.parameters():
        if param in _refusals:
            _refusals.pop(param).remove()


def _refuse(param: Tensor) -> None:
    param.grad = None
    raise StateError(
        "a gradient has reached a module that fabric.setup(model) was given without its optimizer, so it would be trained by each rank "
        "for itself: call model, optimizer = fabric.setup(model, optimizer). To evaluate, leave backward() out, set "
        "requires_grad_(False), or take the gradients of inputs by torch.autograd.grad"
    )
