"""In which order a forward comes to the modules of a model: backward completes gradients in about the reverse of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .arriving import take_idle_hook
from .compiled import runs_compiled


class FirstUses:
    """Watches until `stop` in which order modules are called for the first time, by whichever forwards.

    A parameter that several modules have counts for the first of them, where backward, on its way back, adds the last part of its
    gradient. Compiled code does not tell which modules it goes through.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._place_of: dict[nn.Module, int] = {}
        hook = _Hook(self._place_of)
        self._handles: list[RemovableHandle] = []
        if not runs_compiled(model):
            own = (part for part in model.modules() if next(part.parameters(), None) is not None)
            self._handles += [part.register_forward_pre_hook(hook) for part in own]

    def stop(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def params(self) -> list[nn.Parameter]:
        """Those that have been used, in the order of their first uses. Those of a module that was not called itself count as those
        of the module that it is in, which may have used them."""
        if runs_compiled(self._model):
            return []
        places: dict[nn.Parameter, int] = {}
        for param, place in _places_in(self._model, self._place_of, None):
            places[param] = min(place, places.get(param, place))
        return sorted(places, key=places.__getitem__)


def _places_in(
    module: nn.Module, place_of: dict[nn.Module, int], above: int | None
) -> Iterator[tuple[nn.Parameter, int]]:
    place = place_of.get(module, above)
    if place is not None:
        for param in module.parameters(recurse=False):
            yield param, place
    for child in module.children():
        yield from _places_in(child, place_of, place)


class _Hook:
    """One for all modules."""

    def __init__(self, place_of: dict[nn.Module, int]) -> None:
        self._place_of = place_of

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._place_of.setdefault(module, len(self._place_of))

    def __reduce__(self) -> tuple[Callable[[], Callable[[nn.Module, Any], None]], tuple[()]]:
        return take_idle_hook, ()  # a copy of the model is not watched
