"""Norms and clipping by the norm of all gradients, where each rank holds a slice of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .collectives import Transport
from .gradient_store import GradientStore

# As in torch.nn.utils.clip_grad_norm_: keeps the coefficient finite when all gradients are zero.
_EPSILON = 1e-6


def norm_of_shards(stores: Sequence[GradientStore], transport: Transport, norm_type: float) -> Tensor:
    """The norm of all reduced gradients, over all ranks, 0-dim float64, the same on all ranks. Collective."""
    norms = [_norm_of(store, norm_type) for store in stores if store.holds_sum]
    local = (
        torch.linalg.vector_norm(torch.stack(norms), norm_type)
        if norms
        else torch.zeros((), dtype=torch.float64, device=stores[0].reduced.device)
    )
    local_sum = local if math.isinf(norm_type) else local.pow(norm_type)
    by_slice = transport.gather_scalar(local_sum, label="gradient norms")
    # Summed in the same order on every rank, so that all clip by the same coefficient, whatever the transport.
    return by_slice.max() if math.isinf(norm_type) else by_slice.sum().pow(1.0 / norm_type)


def norm_of_whole(stores: Sequence[GradientStore], grads: Sequence[Sequence[Tensor]], norm_type: float) -> Tensor:
    """The norm of gradients that every rank has whole, 0-dim float64. Not collective.

    Args:
        grads: by store.
    """
    norms = [_norm_together(store, of_one, norm_type) for store, of_one in zip(stores, grads, strict=True)]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return norm


def _norm_together(store: GradientStore, grads: Sequence[Tensor], norm_type: float) -> Tensor:
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=store.reduced.device)
    wide = torch.float64 if grads[0].dtype is torch.float64 else torch.float32
    norms = [torch.linalg.vector_norm(grad, norm_type, dtype=wide).double() for grad in grads]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return norm if store.factor is None else norm * store.factor.abs()


def clip_by(stores: Sequence[GradientStore], norm: Tensor, max_norm: float) -> None:
    """Scale reduced gradients, whose norm over all ranks is given, so that it is at most `max_norm`."""
    coefficient = (float(max_norm) / (norm + _EPSILON)).clamp(max=1.0)
    if coefficient.is_cpu and coefficient == 1:
        return
    for store in stores:
        if store.holds_sum:
            store.scale(coefficient)


def note_norm(store: GradientStore, norm_type: float) -> Tensor:
    """The norm of a bucket's reduced gradients on this rank, before their factor; 0-dim float64, computed once for each sum.

    Gaps between parameters are zero, and so are the gradients of parameters that no rank used: whole shards can be taken.
    """
    if store.norm is None or store.norm[0] != norm_type:
        store.norm = norm_type, _compute_norm(store, norm_type)
    return store.norm[1]


def is_finite(store: GradientStore) -> Tensor:
    """Whether all reduced gradients of a bucket on this rank are finite; 0-dim bool."""
    return note_norm(store, 2.0).isfinite()


def _norm_of(store: GradientStore, norm_type: float) -> Tensor:
    norm = note_norm(store, norm_type)
    return norm if store.factor is None else norm * store.factor.abs()


def _compute_norm(store: GradientStore, norm_type: float) -> Tensor:
    if norm_type == 2.0:
        return store.square_sum().sqrt()
    wide = torch.float64 if store.reduced.dtype is torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(store.reduced, norm_type, dtype=wide)
    return norm.double()
