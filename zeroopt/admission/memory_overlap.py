"""Tensors of a model that lie in the same memory: moving a parameter into a bucket would untie them without a word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ConfigError
from ..plan.dtensors import local_of
from ..plan.params import ManagedParam


@dataclass(frozen=True)
class _Extent:
    """Where a tensor lies: addresses from `begin` up to `end`.

    Attributes:
        what: how messages call it.
        moves: it is about to move into a bucket.
    """

    begin: int
    end: int
    what: str
    moves: bool


def check_overlaps(model: nn.Module, moving: Sequence[ManagedParam]) -> None:
    """Raise ConfigError when a parameter that is about to move shares memory with another parameter, trained or not, or with a
    buffer. Of tensors with gaps, all that lies between their first and last element counts as theirs."""
    longest: dict[bool, _Extent] = {}  # of those that move, and of the others, the one that ends last
    extents = _extents(model, {managed.param for managed in moving})
    for extent in sorted(extents, key=lambda extent: extent.begin):
        for other in longest.values():
            if other.end > extent.begin and (other.moves or extent.moves):
                raise ConfigError(
                    f"{other.what} and {extent.what} share memory, out of which trained parameters move; to tie them, assign the "
                    "same Parameter object to both modules, or, in place of one that is not trained, use the other's detach() "
                    "in forward"
                )
        if extent.moves not in longest or extent.end > longest[extent.moves].end:
            longest[extent.moves] = extent


def check_expanded(model: nn.Module) -> None:
    """Raise ConfigError when several elements of a parameter or buffer are one place in memory: it cannot take over the values
    of another rank."""
    for tensor, what in _tensors(model).items():
        local = local_of(tensor)
        if local.numel() and any(n > 1 and stride == 0 for n, stride in zip(local.shape, local.stride(), strict=True)):
            raise ConfigError(
                f"{what} of shape {list(tensor.shape)} is expanded: several of its elements are one place in memory, so that it "
                "cannot take over the values of another rank; give the model a clone() of it"
            )


def _tensors(model: nn.Module) -> dict[Tensor, str]:
    """What has elements in memory, and how messages call it."""
    found: dict[Tensor, str] = {}
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if not is_lazy(tensor) and tensor.layout is torch.strided and not tensor.is_meta:
                found.setdefault(tensor, f"{kind} {name!r}")
    return found


def _extents(model: nn.Module, moving: set[nn.Parameter]) -> Iterator[_Extent]:
    for tensor, what in _tensors(model).items():
        local = local_of(tensor)
        begin = 0
        with suppress(RuntimeError):  # wrappers around other tensors have no memory to tell of
            begin = local.data_ptr()
        if begin and local.numel():
            last = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
            yield _Extent(begin, begin + (last + 1) * local.element_size(), what, tensor in moving)
