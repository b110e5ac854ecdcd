"""Norms and clipping by the norm of all gradients, where each rank holds a slice of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..collectives import Transport
from ..plan.params import ManagedParam
from ..storage.factors import scale_sums
from ..storage.gradient_store import GradientStore
from ..storage.square_table import SquareTable
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
    held = [store for store in stores if store.holds_sum]
    local = (
        torch.linalg.vector_norm(_norms_of(held, norm_type), norm_type)
        if held
        else torch.zeros((), dtype=torch.float64, device=stores[0].reduced.device)
    )
    local_sum = local if math.isinf(norm_type) else local.pow(norm_type)
    everyone = transport.gather_scalar(local_sum, label="gradient norms")
    by_slice = everyone[: transport.num_slices]  # further replicas have the same
    # Summed in the same order on every rank, so that all clip by the same coefficient, whatever the transport.
    if math.isinf(norm_type):
        return beyond.max_over_model(by_slice.max())
    return beyond.sum_over_model(by_slice.sum()).pow(1.0 / norm_type)


def norm_of_whole(params: Sequence[tuple[ManagedParam, GradientStore]], beyond: NormGroups, norm_type: float) -> Tensor:
    """The norm of gradients that every data-parallel rank has whole, 0-dim float64. Collective with the groups `beyond` them."""
    norms = [torch.zeros((), dtype=torch.float64, device="cpu")]
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


def note_norms(stores: Sequence[GradientStore], norm_type: float) -> None:
    """Have the norms of buckets' reduced gradients on this rank ready, before their factors, in `store.norm`: 0-dim float64, computed
    once for each sum.

    Gaps between parameters are zero, and so are the gradients of parameters that no rank used: whole shards can be taken.
    """
    missing = [store for store in stores if store.norm is None or store.norm[0] != norm_type]
    if norm_type == 2.0:
        for together in _in_one_launch(missing):
            for store, norm in zip(together, _square_sums(together).sqrt().unbind(), strict=True):
                store.norm = norm_type, norm
    else:
        for store in missing:
            store.norm = norm_type, _compute_norm(store, norm_type)


def is_finite(store: GradientStore) -> Tensor:
    """Whether all reduced gradients of a bucket on this rank are finite; 0-dim bool."""
    return torch.isfinite(_noted(store, 2.0))


def _noted(store: GradientStore, norm_type: float) -> Tensor:
    note_norms([store], norm_type)
    assert store.norm is not None
    return store.norm[1]


def _norms_of(stores: Sequence[GradientStore], norm_type: float) -> Tensor:
    """What each bucket counts for in the norm of the model, float64 [number of stores]."""
    note_norms(stores, norm_type)
    norms = torch.stack([_weighted(store, norm_type) for store in stores])
    factors = [store.factor for store in stores]
    if all(factor is factors[0] for factor in factors):
        return norms if factors[0] is None else norms * factors[0].abs()
    one = norms.new_ones(())
    return norms.mul(torch.stack([one if factor is None else factor.double().abs() for factor in factors]))


def _weighted(store: GradientStore, norm_type: float) -> Tensor:
    norm = _noted(store, norm_type)
    return norm if store.norm_weight == 1 else norm * store.norm_weight ** (1.0 / norm_type)


def _in_one_launch(stores: Sequence[GradientStore]) -> list[list[GradientStore]]:
    """Stores whose squares are summed in one call: on a device those of one storage, if there are kernels for it."""
    together: dict[object, list[GradientStore]] = {}
    for store in stores:
        is_alone = store.reduced.is_cpu or not store.can_be_in_table
        together.setdefault(store if is_alone else store.storage, []).append(store)
    return list(together.values())


def _square_sums(stores: Sequence[GradientStore]) -> Tensor:
    """The sums of the squares of `reduced`, float64 [number of stores], each finite only where all elements are."""
    first = stores[0]
    if first.storage is None or not first.can_be_in_table:
        norm: Tensor = torch.linalg.vector_norm(first.reduced, dtype=torch.float64)
        return norm.square().reshape(1)
    arrays = [store.in_table() for store in stores]
    if first.squares is None or not first.squares.is_of(arrays):
        first.squares = SquareTable(first.storage, arrays)
    first.read_by_graphs.note(first.squares, first.squares.device)
    return first.squares.sums()


def _compute_norm(store: GradientStore, norm_type: float) -> Tensor:
    wide = torch.float64 if store.reduced.dtype is torch.float64 else torch.float32
    if store.reduced.numel() == 0:  # of which torch does not know the largest element
        return store.reduced.new_zeros((), dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(store.reduced, norm_type, dtype=wide)
    return norm.double()
