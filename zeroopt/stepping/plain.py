"""One step by the optimizer's own `step`, on leaves that take the place of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..probing.probe import step_without_hooks
from ..storage.own_shard import OwnShard
from .paged_state import new_state_in_pages


def step_plain(optimizer: torch.optim.Optimizer, shards: Sequence[OwnShard], flags: Sequence[int]) -> None:
    """Step the segments of the active parameters.

    Args:
        flags: [number of parameters], 1 where the parameter has a gradient.
    """
    segments = [(shard, segment) for shard in shards for segment in shard.bucket.segments]
    for shard, segment in segments:
        if flags[segment.owner.index]:
            segment.shard.grad = shard.grad_of(segment)
    with new_state_in_pages(optimizer, [segment.shard for _, segment in segments]):
        call_on_leaves(optimizer, step_without_hooks, shards)
    for _, segment in segments:
        segment.shard.grad = None


def call_on_leaves(
    optimizer: torch.optim.Optimizer, method: Callable[[torch.optim.Optimizer], object], shards: Sequence[OwnShard]
) -> None:
    """Call a method of the optimizer that writes parameters, with this rank's segments in their place."""
    by_group: list[list[torch.nn.Parameter]] = [[] for _ in optimizer.param_groups]
    for shard in shards:
        for segment in shard.bucket.segments:
            by_group[segment.owner.group].append(segment.shard)
    with _leaves_in_groups(optimizer, by_group):
        method(optimizer)
    for shard in shards:
        shard.master.round_stepped()
        shard.publish()


@contextmanager
def _leaves_in_groups(optimizer: torch.optim.Optimizer, by_group: Sequence[list[torch.nn.Parameter]]) -> Iterator[None]:
    """The groups keep being the user's dict objects, so the leaves take the parameters' place in them for a moment."""
    groups = optimizer.param_groups
    whole = [group["params"] for group in groups]
    for group, leaves in zip(groups, by_group, strict=True):
        group["params"] = leaves
    try:
        yield
    finally:
        for group, params in zip(groups, whole, strict=True):
            group["params"] = params
