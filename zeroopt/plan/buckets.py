"""Which parameters share a bucket, and in what order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._C import Plan
from ..collectives import ControlGroup
from ..options.precision import Precision
from .ownership import Ownership
from .params import ManagedParam

PLANNING_ANEW = "planning the buckets anew, after the first step"  # for messages


def make_plan(params: Sequence[ManagedParam], ownership: Ownership, bucket_bytes: int, precision: Precision) -> Plan:
    """Plan buckets for parameters in the model's order; those of one dtype, device and number of copies share buckets.

    Where ranks step slices, whole parameters lie in one slice each.
    """
    dtypes = [precision.stored_dtype(p.param.dtype) for p in params]
    kinds: dict[tuple[torch.dtype, torch.device, int], int] = {}
    kind_of = [kinds.setdefault((d, p.param.device, p.copies), len(kinds)) for d, p in zip(dtypes, params, strict=True)]
    return Plan(
        [p.numel for p in params],
        kind_of,
        [dtype.itemsize for dtype in dtypes],
        ownership.num_slices,
        precision.alignment,
        bucket_bytes,
        [p.whole_cost if ownership.by_slices else None for p in params],
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


def is_grouped_alike(before: Sequence[set[int]], plan: Plan, ordered: Sequence[ManagedParam]) -> bool:
    """Whether a plan puts the same parameters into the same buckets, in whatever order within a bucket.

    Args:
        before: indices of the parameters of each bucket that there is.
        ordered: the parameters that the plan is for, in its order.
    """
    after = [{ordered[i].index for i in layout.params} for layout in plan.buckets]
    return before == after
