"""What outer steps take on one rank, counted from its buckets before there are any."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...options.config import Config
from ...probing.state_size import StateSize
from ...storage.bucket import Bucket
from .anchor import anchor_dtype, is_rounded, padded_numel
from .fragments import Schedule
from .optimizer import make_tried
from .wires import outer_wire

_AT_ONCE = 3  # buckets of one step: one sets out, one is stepped, one arrives


def outer_bytes(buckets: Sequence[Bucket], config: Config, num_groups: int) -> int:
    """Of anchors, of this rank's slice of the outer optimizer's arrays, and of buckets on the way; 0 without outer steps.

    Args:
        num_groups: of ranks that average.
    """
    if config.outer_optimizer is None:
        return 0
    state = StateSize(make_tried(config.outer_optimizer), 0, torch.device("cpu"))
    wire = outer_wire(config.outer_dtype, lambda: (0, 0), 0)
    kept, sizes = 0, []
    for bucket in buckets:
        dtype = anchor_dtype(bucket)
        numel = padded_numel(bucket.own_param.numel(), num_groups)
        mine = numel // num_groups
        kept += numel * dtype.itemsize + state.of_elements(mine, dtype)
        kept += mine * dtype.itemsize if is_rounded(wire, dtype) else 0
        sizes.append(numel * (wire.dtype or dtype).itemsize)
    return kept + max(sizes) * _most_on_the_way(len(buckets), config)


def outer_bytes_saved(buckets: Sequence[Bucket], config: Config) -> int:
    """Of the outer optimizer's arrays as they are put together to be saved."""
    if config.outer_optimizer is None:
        return 0
    state = StateSize(make_tried(config.outer_optimizer), 0, torch.device("cpu"))
    wire = outer_wire(config.outer_dtype, lambda: (0, 0), 0)
    total = 0
    for bucket in buckets:
        dtype, numel = anchor_dtype(bucket), bucket.own_param.numel()
        total += state.of_elements(numel, dtype) + (numel * dtype.itemsize if is_rounded(wire, dtype) else 0)
    return total


def _most_on_the_way(num_buckets: int, config: Config) -> int:
    """How many buckets travel at once at most."""
    assert config.average_every is not None
    schedule = Schedule(config.average_every, config.outer_fragments, config.outer_delay)
    steps = range(config.average_every + 1, 2 * config.average_every + 1)
    fragments = max(len(schedule.on_the_way(step)) for step in steps)
    of_one = -(-num_buckets // config.outer_fragments)
    return min(num_buckets, max(_AT_ONCE, fragments * of_one + (_AT_ONCE if fragments else 0)))
