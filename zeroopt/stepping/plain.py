"""One step by the optimizer's own `step`, on leaves that take the place of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..probing.probe import step_without_hooks
from ..storage.own_shard import OwnShard
from .paged_state import new_state_in_pages
from .part_state import parts_of
from .parts import Leaves, in_parts


def step_plain(optimizer: torch.optim.Optimizer, shards: Sequence[OwnShard], flags: Sequence[int]) -> None:
    """Step the segments of the active parameters.

    Args:
        flags: [number of parameters], 1 where the parameter has a gradient.
    """
    segments = [(shard, segment) for shard in shards for segment in shard.bucket.segments]

    def give_gradients(leaves_of: Leaves) -> None:
        for shard, segment in segments:
            if flags[segment.owner.index]:
                grad, leaves = shard.grad_of(segment), leaves_of[segment]
                grads = [grad] if len(leaves) == 1 else parts_of(segment.owner, grad)
                for leaf, part in zip(leaves, grads, strict=True):
                    leaf.grad = part

    with new_state_in_pages(optimizer, [segment.shard for _, segment in segments]):
        call_on_leaves(optimizer, step_without_hooks, shards, give_gradients)
    for _, segment in segments:
        segment.shard.grad = None


def call_on_leaves(
    optimizer: torch.optim.Optimizer,
    method: Callable[[torch.optim.Optimizer], object],
    shards: Sequence[OwnShard],
    prepare: Callable[[Leaves], None] | None = None,
) -> None:
    """Call a method of the optimizer that writes parameters, with this rank's segments, or their parts, in their place.

    Args:
        prepare: is called before with what takes their place.
    """
    by_group: list[list[torch.nn.Parameter]] = [[] for _ in optimizer.param_groups]
    segments = [segment for shard in shards for segment in shard.bucket.segments]
    with in_parts(optimizer, segments) as leaves_of:
        for segment in segments:
            by_group[segment.owner.group].extend(leaves_of[segment])
        if prepare is not None:
            prepare(leaves_of)
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
