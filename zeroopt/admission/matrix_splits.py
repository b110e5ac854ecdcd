"""Which parameters are stepped part by part, as the option `matrix_splits` says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import ConfigError
from ..options.config import Config
from ..options.splits import split_of
from ..plan.params import ManagedParam
from ..stepping.part_state import problem_with_parts
from ..stepping.rules import rule_for


def check_names(model: nn.Module, config: Config) -> None:
    """Raise ConfigError when no parameter of the model is called as the option says; which optimizer has it does not matter."""
    names = [name for name, _ in model.named_parameters()]
    for pattern, split in (config.matrix_splits or {}).items():
        if not any(split_of({pattern: split}, name) for name in names):
            raise ConfigError(
                f"matrix_splits: no parameter of the model is called {pattern!r}; there are {', '.join(names[:5])}, …"
            )


def apply_splits(optimizer: torch.optim.Optimizer, params: Sequence[ManagedParam], config: Config) -> None:
    """Note of each parameter of what parts it consists. Element-wise optimizers do the same on parts and on the whole.

    Raises:
        ConfigError: a parameter has no such parts, a kernel steps it whole, or the optimizer has state of it that parts cannot have.
    """
    if config.matrix_splits is None:
        return
    for managed in params:
        split = split_of(config.matrix_splits, managed.name)
        if split is not None:
            managed.part_sizes = split.sizes(managed.name, managed.shape)
            managed.part_dim = split.dim
    cut = [managed for managed in params if managed.part_sizes]
    for managed in cut:
        problem = problem_with_parts(managed, optimizer.state.get(managed.param, {}))
        if problem is not None:
            raise ConfigError(
                f"matrix_splits: the state that {type(optimizer).__name__} has of parameter {managed.name!r} has {problem}; begin "
                "with an optimizer that has not stepped it"
            )
    if config.fused and rule_for(optimizer) is not None and any(managed.is_whole for managed in cut):
        raise ConfigError(
            f"matrix_splits: a fused kernel steps the parameters of {type(optimizer).__name__} whole; pass fused=False"
        )
