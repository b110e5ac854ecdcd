"""The hook by which autograd tells that a parameter's gradient is complete, after every hook of the user's.

Hooks on a parameter run in the order in which they were registered, and each may change the gradient. One that was registered
after `zeroopt.wrap` would run when the gradient is on its way already. So a hook of ours that finds others behind it goes to
the end of the row, for the backward passes to come, and has the gradient taken up when this one is through.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from torch import Tensor

from ..untraced import untraced_hook
from .counting import Arrivals, CountingHook


class Taker(Protocol):
    """Who takes gradients up."""

    def take_up(self, index: int) -> None:
        """The gradient of a parameter is complete in `param.grad`."""

    def take_up_later(self, index: int) -> None:
        """It will be when backward is through."""

    def complete(self, bucket: int) -> None:
        """The last gradient of a bucket has been counted."""


class GradientHook(CountingHook):
    """The hook of one parameter. It runs between two kernels of the user's, so it does as little as it can: mostly it counts.

    Autograd keeps it where the garbage collector does not look, so it must not keep parameters or the taker alive.

    Args:
        arrivals: of the taker, in which gradients are counted that it need not look at.
        index: what the taker calls the parameter.
    """

    __slots__ = ("_handle", "_taker")

    def __init__(self, taker: Taker, arrivals: Arrivals, param: Tensor, index: int) -> None:
        hooks = param._post_accumulate_grad_hooks or {}
        for key in [key for key, hook in hooks.items() if type(hook) is GradientHook and hook.is_idle]:
            del hooks[key]  # of a model that was wrapped before
        self._taker = weakref.ref(taker)
        self.arrivals = arrivals
        self.index = index
        self._handle = param.register_post_accumulate_grad_hook(self)  # type: ignore[no-untyped-call]

    @untraced_hook
    def look(self, param: Tensor) -> None:
        taker = self._taker()
        if taker is None:
            return
        hooks = param._post_accumulate_grad_hooks
        if len(hooks) == 1:
            taker.take_up(self.index)
        elif next(reversed(hooks.values())) is not self:
            hooks[self._handle.id] = hooks.pop(self._handle.id)
            taker.take_up_later(self.index)
        elif param.grad is not None:  # else one of the others has cleared it
            taker.take_up(self.index)

    @untraced_hook
    def complete(self, bucket: int) -> None:
        taker = self._taker()
        if taker is not None:
            taker.complete(bucket)

    def remove(self) -> None:
        """Take the hook off the parameter."""
        self._handle.remove()

    @property
    def is_idle(self) -> bool:
        """Whether the taker is gone."""
        return self._taker() is None


def is_taken_up(param: Tensor) -> bool:
    """Whether a wrapped model takes a parameter's gradients up."""
    hooks = param._post_accumulate_grad_hooks or {}
    return any(type(hook) is GradientHook and not hook.is_idle for hook in hooks.values())
