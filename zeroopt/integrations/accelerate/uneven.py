"""Ranks with different numbers of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...errors import ConfigError
from ...module import ZeroDataParallel
from ...optimizer import ZeroOptimizer
from .optimizers import plain_optimizer


def model_to_join(joinables: Sequence[Any]) -> ZeroDataParallel | None:
    """Which of the objects given to `join_uneven_inputs` is wrapped by zeroopt. Its optimizers may be among them.

    Raises:
        ConfigError: there are others beside it.
    """
    models = [one for one in joinables if isinstance(one, ZeroDataParallel)]
    if not models:
        return None
    others = [one for one in joinables if one is not models[0] and not _trains(one, models[0])]
    if others:
        raise ConfigError(
            f"expected one prepared model, whose optimizers it covers, got {len(joinables)} objects, {type(others[0]).__name__} among "
            "them: ranks that have left the loop can answer for one model only; put both into one module, or give all ranks the same "
            "number of batches (even_batches=True)"
        )
    return models[0]


def _trains(optimizer: Any, model: ZeroDataParallel) -> bool:
    inner = plain_optimizer(optimizer) if hasattr(optimizer, "param_groups") else optimizer
    return isinstance(inner, ZeroOptimizer) and any(inner is one for one in model.optimizers)


@contextmanager
def batches_made_even(loaders: Sequence[Any], even_batches: bool | None) -> Iterator[None]:
    """Within it, loaders go by another `even_batches`, as far as they have batch samplers of Accelerate's."""
    samplers: list[Any] = [getattr(loader, "batch_sampler", None) for loader in loaders]
    changed = [(sampler, sampler.even_batches) for sampler in samplers if hasattr(sampler, "even_batches")]
    try:
        for sampler, _ in changed if even_batches is not None else ():
            sampler.even_batches = even_batches
        yield
    finally:
        for sampler, before in changed:
            sampler.even_batches = before
