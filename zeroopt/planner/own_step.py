"""What an optimizer's own step takes for itself while it runs. Kernels of zeroopt's take nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..options.config import Config
from ..probing.probe import copy_with, step_without_hooks
from ..stepping.rules import rule_for
from ..storage.segment import Segment
from ..untraced import uncompiled
from .live_bytes import LiveBytes
from .rehearsal import Rehearsal

_GUESS = 2  # arrays like the parameter, of a step that cannot do without values


def own_step_bytes(rehearsal: Rehearsal, optimizer: torch.optim.Optimizer, config: Config, device: str) -> int:
    """The most that a step holds beyond parameters, gradients and state, in bytes; 0 where kernels step all buckets."""
    has_kernel = bool(config.fused) and rule_for(optimizer) is not None
    segments: list[Segment] = []
    casts = 0
    for bucket, store in zip(rehearsal.buckets, rehearsal.stores, strict=True):
        if has_kernel and config.precision.storage(bucket.dtype, store.reduced.dtype) is not None:
            continue
        segments += bucket.segments
        casts += sum(s.shard.nbytes for s in bucket.segments if s.shard.dtype is not store.reduced.dtype)
    return casts + max((_of_group(optimizer, group, segments, device) for group in _groups(segments)), default=0)


def _groups(segments: Sequence[Segment]) -> list[int]:
    return sorted({segment.owner.group for segment in segments})


def _of_group(optimizer: torch.optim.Optimizer, group: int, segments: Sequence[Segment], device: str) -> int:
    shards = [segment.shard for segment in segments if segment.owner.group == group]
    largest = max(shards, key=lambda shard: shard.nbytes)
    own = _of_tensor(optimizer, group, largest)
    foreach = optimizer.param_groups[group].get("foreach", False)
    if foreach or (foreach is None and device == "cuda"):  # torch's default there: all tensors at a time
        return round(own / max(1, largest.nbytes) * sum(shard.nbytes for shard in shards))
    return own


@uncompiled
def _of_tensor(optimizer: torch.optim.Optimizer, group: int, shard: nn.Parameter) -> int:
    param = nn.Parameter(torch.empty_like(shard, device="meta"))
    try:
        probe = copy_with(optimizer, group, [[param]], set(), with_state=False)
        param.grad = torch.empty_like(param)
        step_without_hooks(probe)
        known = [leaf for leaf in tree_leaves(dict(probe.state[param])) if isinstance(leaf, Tensor)]
        with LiveBytes([param, param.grad, *known]) as live:
            step_without_hooks(probe)
    except Exception:  # noqa: BLE001  it looks at values
        return _GUESS * shard.nbytes
    most: int = live.most
    return most
