"""What gives modules their values, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..errors import ConfigError
from .saved import Saved

Init: TypeAlias = Callable[[nn.Module], object]
"""Gives values to the parameters and buffers of a module, in place. What it returns is of no interest."""


def reset_parameters(module: nn.Module) -> None:
    """Call the module's own `reset_parameters()`, or `_reset_parameters()` as some of torch's call it, if it has one."""
    reset: Any = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()


def as_functions(init: Init | Saved | Sequence[Init | Saved] | None) -> tuple[Init | Saved, ...]:
    """The functions that each go over all modules, one after the other, and what is read in between.

    Raises:
        ConfigError: they are no functions.
    """
    if init is None:
        return (reset_parameters,)
    functions = tuple(init) if isinstance(init, list | tuple) else (init,)
    for function in functions:
        if not (callable(function) or isinstance(function, Saved)):
            raise ConfigError(
                f"expected init to be a function of a module, or several, got a {type(function).__name__}: {function!r}"
            )
    return functions


def in_order_of_construction(model: nn.Module, unmade: dict[Tensor, Any]) -> Iterator[nn.Module]:
    """The modules that hold some of the tensors, or have parts that do. Each comes once, after its parts, as in `model.apply`.

    That is the order in which constructors end, where each module makes its parts in the order in which it registers them.
    """
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        seen.add(module)
        for child in module.children():
            if child not in seen:
                yield from visit(child)
        if any(tensor in unmade for tensor in (*module.parameters(), *module.buffers())):
            yield module

    return visit(model)
