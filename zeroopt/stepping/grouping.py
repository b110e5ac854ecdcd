"""Which buckets a fused kernel steps in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import ops
from ..storage.own_shard import OwnShard
from ..streams import has_streams

MOST_ELEMENTS = 2**28
"""Of one call. It takes a device a millisecond or two, beside which a launch is nothing; and gathers begin behind it."""

Group = tuple[list[OwnShard], ops.Storage]


def in_groups(fused: Sequence[tuple[OwnShard, ops.Storage]], *, one_by_one: bool) -> list[Group]:
    """Buckets of one storage and one home together, those that the next forward needs first in the last group.

    A launch costs the host what a small bucket costs the device. On the CPU a call costs nothing, and the sooner a bucket is done,
    the sooner it is gathered: there each is alone.

    Args:
        fused: in the order of the buckets. Each group keeps it.
        one_by_one: each alone on a device as well.
    """
    groups: list[Group] = []
    filling: dict[tuple[ops.Storage, torch.device], tuple[list[OwnShard], int]] = {}
    for shard, storage in reversed(fused):
        numel = shard.master.param.numel()
        shards, room = filling.get((storage, shard.device), ([], 0))
        if numel > room or one_by_one or not has_streams(shard.device):
            shards, room = [], MOST_ELEMENTS
            groups.append((shards, storage))
        shards.append(shard)
        filling[storage, shard.device] = shards, room - numel
    for shards, _ in groups:
        shards.reverse()
    groups.reverse()
    return groups
