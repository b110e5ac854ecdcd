"""Clipping by the norm of all gradients, where each rank holds a slice of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .collectives import Transport
from .errors import ConfigError
from .gradient_store import GradientStore

# As in torch.nn.utils.clip_grad_norm_: keeps the coefficient finite when all gradients are zero.
_EPSILON = 1e-6


def clip_shards(stores: Sequence[GradientStore], transport: Transport, max_norm: float, norm_type: float) -> Tensor:
    """Scale the reduced gradients so that the norm of all of them, over all ranks, is at most `max_norm`.

    Collective: one exchange of a scalar.

    Returns:
        The norm before clipping, a 0-dim float32 tensor, the same on all ranks.
    """
    if not norm_type > 0:
        raise ConfigError(f"expected norm_type to be positive or inf, got {norm_type!r}")
    shards = [store.reduced for store in stores if store.holds_sum]
    norm = _norm_over_ranks(shards, stores[0].reduced.device, transport, float(norm_type))
    coefficient = (float(max_norm) / (norm + _EPSILON)).clamp(max=1.0)
    for shard in shards:
        shard.mul_(coefficient.to(shard.dtype))
    return norm.float()


def _norm_over_ranks(shards: Sequence[Tensor], device: torch.device, transport: Transport, norm_type: float) -> Tensor:
    """(sum over ranks of sum |g|^p)^(1/p), or the largest |g| for inf, in float64. Gaps between parameters are zero, and
    so are the gradients of parameters that no rank used, so that whole shards can be taken."""
    norms = [torch.linalg.vector_norm(shard, norm_type, dtype=_wide(shard)).double() for shard in shards]
    local = (
        torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=device).double()
    )
    local_sum = local if math.isinf(norm_type) else local.pow(norm_type)
    by_rank = transport.gather_scalar(local_sum, label="gradient norms")
    # Summed in rank order on every rank, so that all clip by the same coefficient, whatever the transport.
    return by_rank.max() if math.isinf(norm_type) else by_rank.sum().pow(1.0 / norm_type)


def _wide(shard: Tensor) -> torch.dtype:
    return torch.float64 if shard.dtype is torch.float64 else torch.float32
