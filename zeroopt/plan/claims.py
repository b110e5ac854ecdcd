"""Which wrapped model trains a parameter: one at a time, for it lies in the buckets of one, and its hook is of one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from ..errors import ConfigError
from .params import ManagedParam


class Owner(Protocol):
    """What a wrapped model and its optimizers have in common, and live as long as.

    Attributes:
        module: the model that was wrapped.
        params: those that are trained.
    """

    module: nn.Module
    params: list[ManagedParam]


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def claim(owner: Owner) -> None:
    """From now on, what the owner trains is its own."""
    _owners.add(owner)


def release(owner: Owner) -> None:
    """From now on, others may train what the owner has trained."""
    _owners.discard(owner)


def is_claimed(module: nn.Module) -> bool:
    """Whether a model is wrapped, and somebody still has what came of it."""
    return _is_still(lambda: any(owner.module is module for owner in _owners))


def claimed_params() -> Iterator[ManagedParam]:
    """All parameters that any wrapped model trains."""
    for owner in list(_owners):
        yield from owner.params


def check_unclaimed(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ConfigError when another wrapped model trains one of these parameters."""
    named = list(named)
    if not _is_still(lambda: bool(_find_claimed(named))):
        return
    name, managed = _find_claimed(named)[0]
    raise ConfigError(
        f"parameter {name!r} is trained by another wrapped model already, where it is {managed.name!r}; a parameter can be in "
        "one only: put both models into one module, and wrap that once, with each of the optimizers in turn. If the other "
        "one is of an earlier run, drop the model, its optimizer and what refers to them (schedulers) first"
    )


def _find_claimed(named: Sequence[tuple[str, Tensor]]) -> list[tuple[str, ManagedParam]]:
    claimed: dict[Tensor, ManagedParam] = {managed.param: managed for managed in claimed_params()}
    return [(name, claimed[param]) for name, param in named if param in claimed]


def _is_still(claimed: Callable[[], bool]) -> bool:
    """Whether something is so, and not only because nobody has collected the garbage, to which a user's own objects may have tied what is
    dropped, such as the traceback of an exception."""
    if not claimed():
        return False
    gc.collect()
    return claimed()
