"""Norms and clipping by the norm of all gradients, where each rank holds a slice of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..collectives import Transport
from ..plan.params import ManagedParam
from ..storage.gradient_store import GradientStore, scale_sums
from .norm_groups import NormGroups

# As in torch.nn.utils.clip_grad_norm_: keeps the coefficient finite when all gradients are zero.
_EPSILON = 1e-6


def norm_of_shards(
    stores: Sequence[GradientStore], transport: Transport, beyond: NormGroups, norm_type: float
) -> Tensor:
    """The norm of all reduced gradients, over all ranks, 0-dim float64, the same on all ranks.

    Collective, also with the ranks that hold other parts of the model: one exchange of a scalar, and one for each of the groups
    `beyond` the data-parallel ranks.
    """
    norms = [_norm_of(store, norm_type) for store in stores if store.holds_sum]
    local = (
        torch.linalg.vector_norm(torch.stack(norms), norm_type)
        if norms
        else torch.zeros((), dtype=torch.float64, device=stores[0].reduced.device)
    )
    local_sum = local if math.isinf(norm_type) else local.pow(norm_type)
    by_slice = transport.gather_scalar(local_sum, label="gradient norms")
    # Summed in the same order on every rank, so that all clip by the same coefficient, whatever the transport.
    if math.isinf(norm_type):
        return beyond.max_over_model(by_slice.max())
    return beyond.sum_over_model(by_slice.sum()).pow(1.0 / norm_type)


def norm_of_whole(params: Sequence[tuple[ManagedParam, GradientStore]], beyond: NormGroups, norm_type: float) -> Tensor:
    """The norm of gradients that every data-parallel rank has whole, 0-dim float64. Collective with the groups `beyond` them."""
    norms = [torch.zeros((), dtype=torch.float64)]
    for managed, store in params:
        grad = managed.local_grad()
        if grad is not None and grad.numel():
            wide = torch.float64 if grad.dtype is torch.float64 else torch.float32
            norm = torch.linalg.vector_norm(grad, norm_type, dtype=wide).double()
            norm = norm * (1.0 / managed.copies) ** (1.0 / norm_type)
            norms.append(norm if store.factor is None else norm * store.factor.abs())
    own = torch.linalg.vector_norm(torch.stack([norm.to(norms[-1].device) for norm in norms]), norm_type)
    if math.isinf(norm_type):
        return beyond.max_over_model(own)
    return beyond.sum_over_model(own.pow(norm_type)).pow(1.0 / norm_type)


def clip_by(stores: Sequence[GradientStore], norm: Tensor, max_norm: float) -> None:
    """Scale reduced gradients, whose norm over all ranks is given, so that it is at most `max_norm`."""
    coefficient = (float(max_norm) / (norm + _EPSILON)).clamp(max=1.0)
    if coefficient.is_cpu and coefficient == 1:
        return
    scale_sums((store for store in stores if store.holds_sum), coefficient)


def note_norm(store: GradientStore, norm_type: float) -> Tensor:
    """The norm of a bucket's reduced gradients on this rank, before their factor; 0-dim float64, computed once for each sum.

    Gaps between parameters are zero, and so are the gradients of parameters that no rank used: whole shards can be taken.
    """
    if store.norm is None or store.norm[0] != norm_type:
        store.norm = norm_type, _compute_norm(store, norm_type)
    return store.norm[1]


def is_finite(store: GradientStore) -> Tensor:
    """Whether all reduced gradients of a bucket on this rank are finite; 0-dim bool."""
    return torch.isfinite(note_norm(store, 2.0))


def _norm_of(store: GradientStore, norm_type: float) -> Tensor:
    norm: Tensor = note_norm(store, norm_type) * store.norm_weight ** (1.0 / norm_type)
    return norm if store.factor is None else norm * store.factor.abs()


def _compute_norm(store: GradientStore, norm_type: float) -> Tensor:
    if norm_type == 2.0:
        return store.square_sum().sqrt()
    wide = torch.float64 if store.reduced.dtype is torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(store.reduced, norm_type, dtype=wide)
    return norm.double()
