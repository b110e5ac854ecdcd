"""Which parameters share a bucket, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch

from .. import ops
from .._C import Plan
from ..collectives import ControlGroup
from ..options.precision import Precision
from .ownership import Ownership
from .params import ManagedParam

PLANNING_ANEW = "planning the buckets anew, before the first step"  # for messages


_MIB = 2**20
_LARGEST = 25 * _MIB  # what DistributedDataParallel takes: beyond it, a bucket costs no less for its size
_SMALLEST = _MIB  # below it, what a bucket costs whatever its size shows in the time of a step
_BUCKETS = 20  # so that two buffers of the size of a bucket are a tenth of the parameters' bytes
# What a link carries while one message is on its way: 200 KB at 50 GB/s and 4 us (NCCL's own figures for a hop between hosts), 60 to
# 250 KB at what a message of Gloo's costs a processor. With five times that for every hop, hops take no more than a fifth of the
# time of what they carry.
_BYTES_A_HOP = _MIB

# Of padding, which is stored and travels: a share of a bucket, or what takes no page more. It goes with the number of ranks:
# where it would be more, buckets become larger than what was asked for.
PADDING_SHARE = 0.01
PADDING_BYTES = 4096


SMALLEST_COMPRESSED = 4096  # elements: below it, codes would save less than the block of a slice that is padded


def is_compressible(managed: ManagedParam, stored: torch.dtype) -> bool:
    """Whether the gradient of a parameter travels as codes, where those are asked for: not of vectors, such as biases and the weights
    of norms, which are few, and of which each element does much; not of small parameters; and not in float64.

    Args:
        stored: dtype of the parameter in its bucket.
    """
    return managed.param.dim() > 1 and managed.numel >= SMALLEST_COMPRESSED and stored in ops.WIRE_DTYPES


def choose_bucket_bytes(bucket_mb: float | None, param_bytes: int, hops: int = 0) -> int:
    """The size of a bucket: what was asked for; else a small part of the model, so that buffers of that size are, and no larger than
    its messages call for.

    A collective of `hops` messages one after the other takes hops * alpha + bytes * beta; see docs/hierarchy.md.

    Args:
        bucket_mb: in MiB; None where nothing was asked for.
        param_bytes: of the model's parameters, as gradients travel.
        hops: messages that a bucket takes one after the other, `Transport.hops`.
    """
    if bucket_mb is not None:
        return max(1, int(bucket_mb * _MIB))
    return min(max(_LARGEST, hops * _BYTES_A_HOP), max(_SMALLEST, param_bytes // _BUCKETS))


def make_plan(
    params: Sequence[ManagedParam],
    ownership: Ownership,
    bucket_bytes: int,
    precision: Precision,
    wire_dtype: torch.dtype | None = None,
    home: torch.device | None = None,
    *,
    compresses: bool = False,
) -> Plan:
    """Plan buckets for parameters in the model's order; those of one dtype, device and number of copies share buckets.

    Where ranks step slices, whole parameters lie in one slice each, or, where that would take more padding, across slices, each with
    a rank that steps it.

    Args:
        bucket_bytes: what neither a bucket nor its gradients on their way exceed, unless one parameter alone does, or so many
            ranks have a slice that it would be padded by more than `PADDING_SHARE`.
        wire_dtype: in which gradients travel; None: in the parameters'.
        home: where parameters are stepped; None: where they are.
        compresses: gradients travel as codes, and those that do not have buckets of their own.
    """
    dtypes = [precision.stored_dtype(p.param.dtype) for p in params]
    kinds: dict[tuple[torch.dtype, torch.device, int, bool], int] = {}
    kind_of = [
        kinds.setdefault((d, p.param.device, p.copies, compresses and is_compressible(p, d)), len(kinds))
        for d, p in zip(dtypes, params, strict=True)
    ]
    # Differences of parameters are those of slices: what a rank steps has to be one.
    keeps_slices = precision.parameter_compression is not None and any(p.is_whole for p in params)
    return Plan(
        [p.numel for p in params],
        kind_of,
        [max(dtype.itemsize, 0 if wire_dtype is None else wire_dtype.itemsize) for dtype in dtypes],
        ownership.num_slices,
        precision.alignment,
        bucket_bytes,
        [p.whole_cost if ownership.by_slices else None for p in params],
        slice_alignment=max((precision.slice_alignment(home or p.param.device) for p in params), default=1),
        padding_share=inf if keeps_slices else PADDING_SHARE,
        padding_bytes=PADDING_BYTES,
    )


def agree_on_order(arrivals: Sequence[int], params: Sequence[ManagedParam], control: ControlGroup) -> list[int]:
    """Indices of the parameters as gradients arrived on rank 0; those that did not come last, in the order of the plan.

    Collective.
    """
    came = set(arrivals)
    late = [managed.index for managed in reversed(params) if managed.index not in came]
    order = torch.tensor([*arrivals, *late], dtype=torch.int64, device=params[0].param.device)
    control.broadcast([order], 0, PLANNING_ANEW)
    return [int(index) for index in order.tolist()]


def in_order(params: Sequence[ManagedParam], order: Sequence[int]) -> list[ManagedParam]:
    """Parameters as the planner takes them, which goes through them from the last one on."""
    return [params[index] for index in reversed(order)]


def most_incomplete(groups: Sequence[set[int]], order: Sequence[int]) -> int:
    """How many buckets have some of their gradients, but not all, at one time, when gradients come in this order.

    Args:
        groups: indices of the parameters of each bucket.
        order: indices of all parameters.
    """
    bucket_of = {index: number for number, group in enumerate(groups) for index in group}
    missing = [len(group) for group in groups]
    incomplete: set[int] = set()
    most = 0
    for index in order:
        bucket = bucket_of[index]
        missing[bucket] -= 1
        if missing[bucket]:
            incomplete.add(bucket)
        else:
            incomplete.discard(bucket)
        most = max(most, len(incomplete))
    return most


def is_grouped_alike(before: Sequence[set[int]], plan: Plan, ordered: Sequence[ManagedParam]) -> bool:
    """Whether a plan puts the same parameters into the same buckets, in whatever order within a bucket.

    Args:
        before: indices of the parameters of each bucket that there is.
        ordered: the parameters that the plan is for, in its order.
    """
    after = [{ordered[i].index for i in layout.params} for layout in plan.buckets]
    return before == after
