"""Flat storage: the parameters of a bucket are parts of one buffer, and so are the pieces of them that this rank owns."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._C import BucketPlan, Plan
from .._C import Segment as PlannedSegment
from ..collectives import Transport
from ..options.precision import Precision, join_master, round_master, split_master
from ..own_storage import with_own_storage
from ..plan.ownership import Ownership
from ..plan.params import ManagedParam, ParamState

# What a master is called among a segment's state, where that is saved or moves to other buckets.
MASTER_NAMES = {torch.float32: "master_param", torch.int16: "remainder"}


@dataclass(eq=False)
class Segment:
    """The part of a parameter that this rank steps.

    Attributes:
        start: first element of the parameter that is in the segment.
        offset: first element of the own range of the bucket that is in the segment.
        shard: the leaf that an optimizer steps: a part of the flat parameters, or of their float32 master. 1-D, or in the
            parameter's own shape (and memory format) where that is whole.
        state_dtype: of the state that an optimizer keeps for it, unless a fused kernel stores it otherwise.
    """

    owner: ManagedParam
    start: int
    offset: int
    numel: int
    shard: nn.Parameter
    state_dtype: torch.dtype

    def view_in(self, own: Tensor) -> Tensor:
        """Its elements of an array over the own range, in the shape of the shard."""
        return _view(own, self.owner, self.offset, self.numel)


def _view(own: Tensor, owner: ManagedParam, offset: int, numel: int) -> Tensor:
    if owner.is_whole:
        return own.as_strided(owner.shape, owner.stride, own.storage_offset() + offset)
    return own[offset : offset + numel]


class Bucket:
    """Parameters of one dtype side by side in one flat buffer, cut into one slice a rank.

    Making one moves the parameters into it: `param.data` becomes a part of it. The values stay, or are rounded to `dtype`; what
    rounding took from the own range is kept in `master`.

    Attributes:
        name: how messages call the bucket.
        precision: what its parameters are kept in.
        flat_param: [padded_numel], all parameters; the gaps between them are zero.
        own_range: the elements of the bucket that this rank steps; its slice, or all of the bucket in stage 0.
        own_param: view of `flat_param` over the own range.
        master: [own range], what completes 16-bit parameters: a float32 copy or int16 remainders; None where nothing does.
        segments: the pieces of parameters in the own range.
        norm_weight: what its gradients count for in a sum over all ranks that hold parts of the model.
    """

    def __init__(
        self,
        index: int,
        layout: BucketPlan,
        params: Sequence[ManagedParam],
        own_range: tuple[int, int],
        transport: Transport,
        precision: Precision,
        *,
        shared: bool,
    ) -> None:
        self.index = index
        self.precision = precision
        self.padded_numel = layout.padded_numel
        self.params = [params[i] for i in layout.params]
        self.dtype = precision.stored_dtype(self.params[0].param.dtype)
        self.device = self.params[0].param.device
        self.norm_weight = 1.0 / self.params[0].copies
        for managed, offset in zip(self.params, layout.offsets, strict=True):
            managed.offset = offset
        self.name = f"bucket {self.index} ({self.params[0].name} … {self.params[-1].name})"
        self.flat_param = transport.allocate(self.padded_numel, self.dtype, self.device, shared=shared)
        self.own_range = own_range
        self.own_param = self.within_own_range(self.flat_param)
        self._state_dtype = precision.sum_dtype(self.dtype, by_slices=True)
        master_dtype = precision.master_dtype(self.dtype)
        self.master = None if master_dtype is None else torch.zeros_like(self.own_param, dtype=master_dtype)
        for managed in self.params:
            self._take_in(managed, writes=transport.writes_parameters or not shared)
        self.segments: list[Segment] = []

    def _take_in(self, managed: ManagedParam, *, writes: bool) -> None:
        """Move a parameter into the bucket, and its master where this rank keeps it."""
        values = managed.local
        view = managed.view_in(self.flat_param)
        if writes:
            view.copy_(round_master(values, self.dtype) if self.master is not None else values)
        if self.master is not None:
            begin, end = self.own_range
            first, last = max(managed.offset, begin), min(managed.offset + managed.numel, end)
            if first < last:
                own = managed.flatten(values)[first - managed.offset : last - managed.offset]
                master = own if self.master.dtype is torch.float32 else split_master(own)[1]
                self.master[first - begin : last - begin].copy_(master)
        managed.set_local(view)

    def cut_segments(self, pieces: Sequence[PlannedSegment], params: Sequence[ManagedParam]) -> None:
        """Make the segments of the own range, as planned."""
        stepped = self.master if self.master is not None and self.master.dtype is torch.float32 else self.own_param
        for piece in pieces:
            owner = params[piece.param]
            assert not owner.is_whole or piece.numel == owner.numel
            shard = nn.Parameter(with_own_storage(_view(stepped, owner, piece.offset, piece.numel)))
            self.segments.append(Segment(owner, piece.start, piece.offset, piece.numel, shard, self._state_dtype))

    def release(self, gone: Collection[ManagedParam]) -> None:
        """Let parameters have memory of their own again. They leave gaps, of whatever values, that nobody steps."""
        for managed in self.params:
            if managed in gone:
                managed.set_local(torch.empty_like(managed.local).copy_(managed.local))
        self.params = [managed for managed in self.params if managed not in gone]
        self.segments = [segment for segment in self.segments if segment.owner not in gone]

    def let_go(self) -> None:
        """Keep no part of the flat buffer any longer, so that it is freed when the last parameter has moved out of it."""
        self.segments.clear()
        self.flat_param = self.own_param = self.flat_param.new_empty(0)
        self.master = None

    def hand_over(self, state: MutableMapping[Tensor, ParamState]) -> None:
        """Put the master of this rank's segments into their state, to be saved or moved with it."""
        if self.master is None:
            return
        name = MASTER_NAMES[self.master.dtype]
        for segment in self.segments:
            state.setdefault(segment.shard, {})[name] = with_own_storage(segment.view_in(self.master))

    def take_back(self, state: MutableMapping[Tensor, ParamState]) -> None:
        """Take the master out of the state again, where there is one in it."""
        if self.master is None:
            return
        name = MASTER_NAMES[self.master.dtype]
        for segment in self.segments:
            entry = state.get(segment.shard, {})
            if name in entry:
                segment.view_in(self.master).copy_(entry.pop(name))
                if not entry:
                    del state[segment.shard]

    def take_up_writes(self) -> None:
        """Let the master follow parameters that something other than a step has written: those it does not round to."""
        if self.master is not None and self.master.dtype is torch.float32:  # remainders are too small to matter
            written = (self.master.to(self.dtype) != self.own_param) & (
                round_master(self.master, self.dtype) != self.own_param
            )
            self.master[written] = self.own_param[written].float()

    def round_masters(self) -> None:
        """Let parameters follow their float32 master, where they have one and it was stepped."""
        if self.master is not None and self.master.dtype is torch.float32:
            self.own_param.copy_(round_master(self.master, self.dtype))

    def exact(self, segment: Segment) -> Tensor:
        """The float32 values of a segment's parameters, of which the model has them rounded; for buckets with a `master`."""
        assert self.master is not None
        own = slice(segment.offset, segment.offset + segment.numel)
        if self.master.dtype is torch.float32:
            return self.master[own]
        return join_master(self.own_param[own], self.master[own])

    def write_exact(self, segment: Segment, values: Tensor) -> None:
        """Set a segment's parameters, and what completes them.

        Args:
            values: float32, in the shape of the segment's shard; rounded where nothing completes the parameters.
        """
        segment.view_in(self.own_param).copy_(round_master(values, self.dtype) if self.master is not None else values)
        if self.master is not None:
            master = values if self.master.dtype is torch.float32 else split_master(values)[1]
            segment.view_in(self.master).copy_(master)

    def within_own_range(self, full: Tensor) -> Tensor:
        """The own range of a flat buffer of this bucket, a view."""
        return full[self.own_range[0] : self.own_range[1]]

    def zero_gaps(self, full: Tensor) -> None:
        """Clear what lies between and behind the parameters in a buffer that has been used for another bucket."""
        end = 0
        for managed in self.params:
            if managed.offset > end:
                full[end : managed.offset].zero_()
            end = managed.offset + managed.numel
        full[end:].zero_()


def make_buckets(
    plan: Plan,
    params: Sequence[ManagedParam],
    ownership: Ownership,
    transport: Transport,
    precision: Precision,
    *,
    shared: bool,
    first_index: int = 0,
) -> list[Bucket]:
    """Move the parameters into buckets, one bucket after the other, so that only one bucket exists twice at a time.

    Collective. With `shared`, the ranks of a host get the same buckets, with the values of the first of them.

    Args:
        params: those that the plan is for, in its order.
        first_index: index of the first of the buckets, which come behind others of the model.
    """
    buckets = []
    for number, layout in enumerate(plan.buckets):
        begin_end = ownership.stepped(layout.padded_numel)
        bucket = Bucket(first_index + number, layout, params, begin_end, transport, precision, shared=shared)
        bucket.cut_segments(plan.segments(number, *begin_end), params)
        buckets.append(bucket)
    return buckets
