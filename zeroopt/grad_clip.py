"""Clipping by the norm of all gradients, where each rank holds a slice of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .collectives import Transport
from .errors import ConfigError
from .gradient_store import GradientStore
from .norm_groups import NormGroups

# As in torch.nn.utils.clip_grad_norm_: keeps the coefficient finite when all gradients are zero.
_EPSILON = 1e-6


def clip_shards(
    stores: Sequence[GradientStore], transport: Transport, beyond: NormGroups, max_norm: float, norm_type: float
) -> Tensor:
    """Scale the reduced gradients so that the norm of all of them, over all ranks, is at most `max_norm`.

    Collective, also with the ranks that hold other parts of the model: one exchange of a scalar, and one for each of
    the groups `beyond` the data-parallel ranks.

    Returns:
        The norm before clipping, a 0-dim float32 tensor, the same on all ranks.
    """
    if not norm_type > 0:
        raise ConfigError(f"expected norm_type to be positive or inf, got {norm_type!r}")
    norm = _norm_over_ranks(stores, transport, beyond, float(norm_type))
    coefficient = (float(max_norm) / (norm + _EPSILON)).clamp(max=1.0)
    if coefficient.is_cpu and coefficient == 1:
        return norm.float()
    for store in stores:
        if store.holds_sum:
            store.scale(coefficient)
    return norm.float()


def note_norm(store: GradientStore, norm_type: float) -> Tensor:
    """The norm of a bucket's reduced gradients on this rank, a 0-dim float64 tensor, computed once for each sum.

    Gaps between parameters are zero, and so are the gradients of parameters that no rank used: whole shards can be taken.
    """
    if store.norm is None or store.norm[0] != norm_type:
        wide = torch.float64 if store.reduced.dtype is torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(store.reduced, norm_type, dtype=wide)
        store.norm = norm_type, norm.double()
    return store.norm[1]


def _norm_over_ranks(
    stores: Sequence[GradientStore], transport: Transport, beyond: NormGroups, norm_type: float
) -> Tensor:
    """(sum over ranks of sum |g|^p)^(1/p), or the largest |g| for inf, in float64."""
    norms = [note_norm(s, norm_type) * s.norm_weight ** (1.0 / norm_type) for s in stores if s.holds_sum]
    device = stores[0].reduced.device
    local = (
        torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=device).double()
    )
    local_sum = local if math.isinf(norm_type) else local.pow(norm_type)
    by_slice = transport.gather_scalar(local_sum, label="gradient norms")
    # Summed in the same order on every rank, so that all clip by the same coefficient, whatever the transport.
    if math.isinf(norm_type):
        return beyond.max_over_model(by_slice.max())
    return beyond.sum_over_model(by_slice.sum()).pow(1.0 / norm_type)
