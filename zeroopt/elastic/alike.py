"""What all ranks have of a model, so that a copy on another host need not travel there: the rank that keeps it takes it from its own
model.

These are the parameters that are kept as exact in the models of all ranks as by who steps them, and the frozen ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.planner import WriteItem

from ..checkpoint.wrapped.contents import clean_name
from ..module import ZeroDataParallel
from .contents import copy_into

_PREFIX = "model."  # of the model, in the names of a checkpoint


class Alike(NamedTuple):
    """Parameters by their names in a copy. trained: that steps change. frozen: that no step changes."""

    trained: Mapping[str, nn.Parameter]
    frozen: Mapping[str, nn.Parameter]

    @staticmethod
    def of(model: ZeroDataParallel) -> Alike:
        """Those of a model that all ranks hold together. The same names on all ranks."""
        exact = {managed.param for b in model.replica.buckets if not b.master.completes for managed in b.params}
        trained = {name: param for name, param in _parameters(model) if param in exact}
        return Alike(trained, frozen_parameters(model))

    @property
    def names(self) -> set[str]:
        """Of all."""
        return {*self.trained, *self.frozen}

    @torch.no_grad()
    def copy_begun(self, targets: Sequence[tuple[WriteItem, Tensor]]) -> Callable[[], None]:
        """Copy what others than steps may change; the rest is copied by what is returned.

        Args:
            targets: parts of these parameters, and the memory for them.
        """
        later: list[tuple[Tensor, Tensor]] = []
        for item, target in targets:
            name = item.index.fqn
            source = _part(self.trained.get(name, self.frozen.get(name)), item)
            if name in self.trained:
                later.append((target, source))
            else:
                copy_into(target, source)

        @torch.no_grad()
        def finish() -> None:
            for target, source in later:
                copy_into(target, source)

        return finish


def frozen_parameters(model: ZeroDataParallel) -> dict[str, nn.Parameter]:
    """Those that no optimizer trains, by their names in a copy."""
    managed = {managed.param for managed in model.replica.params}
    return {name: param for name, param in _parameters(model) if param not in managed}


def _part(param: Tensor | None, item: WriteItem) -> Tensor:
    assert param is not None and item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return param.detach()[tuple(map(slice, chunk.offsets, map(operator.add, chunk.offsets, chunk.sizes)))]


def _parameters(model: ZeroDataParallel) -> Iterator[tuple[str, nn.Parameter]]:
    for name, value in model.module.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            yield _PREFIX + clean_name(name), value
