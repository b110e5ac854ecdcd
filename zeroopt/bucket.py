"""Flat storage: the parameters of a bucket are parts of one buffer, and so are the pieces of them that this rank owns."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from .collectives import Transport
from .own_storage import with_own_storage
from .precision import Precision, join_master, round_master, split_master
from .regions import FlatLayout

# A state entry of a parameter, as torch keeps it: "exp_avg" -> tensor, "step" -> 0-dim tensor, …
ParamState = dict[str, Any]

# What a master is called among a segment's state, where that is saved or moves to other buckets.
MASTER_NAMES = {torch.float32: "master_param", torch.int16: "remainder"}


class Grain(IntEnum):
    """The smallest piece of a parameter that its optimizer can step by itself."""

    ELEMENT = 0
    PARAMETER = 1
    MATRIX = 2
    """The whole parameter, and it must be a matrix: the step multiplies matrices or factors them."""


@dataclass(eq=False)
class ManagedParam:
    """A parameter that zeroopt trains: what its name is, and where it lies.

    Attributes:
        index: position among the managed parameters, in the order of `model.named_parameters()`.
        group: position of its param_group in the optimizer.
        position: position in the optimizer, counted over all groups, as in a torch optimizer's state dict.
        grain: whether ranks may share its step. If not, it lies whole in one rank's slice.
        shape, stride, numel: of the part of it that every rank of the data-parallel group holds, which is the whole
            parameter unless it is a DTensor; see `local_tensor`. All methods are about that part.
        copies: ranks outside of the data-parallel group, and this one, that hold the same elements.
    """

    name: str
    param: nn.Parameter
    index: int
    group: int
    position: int
    grain: Grain = Grain.ELEMENT
    offset: int = field(default=-1, init=False)
    copies: int = field(default=1, init=False)
    shape: torch.Size = field(init=False)
    stride: tuple[int, ...] = field(init=False)
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.shape = self.local.shape
        self.stride = self.local.stride()
        self.numel = self.local.numel()

    @property
    def local(self) -> Tensor:
        """The parameter's elements on this rank, a tensor without gradient."""
        return self.param.data

    def set_local(self, view: Tensor) -> None:
        """Let the parameter's elements be those of `view`, which may be of another dtype."""
        self.param.data = with_own_storage(view)

    def data_ptr(self) -> int:
        """Address of the parameter's elements."""
        return self.param.data_ptr()

    def local_grad(self) -> Tensor | None:
        """This rank's part of `param.grad`."""
        return self.param.grad

    def set_local_grad(self, view: Tensor) -> None:
        """Let this rank's part of `param.grad` be `view`."""
        self.param.grad = view

    def layout_like(self, local: Tensor) -> Tensor:
        """A tensor of the parameter's global shape and placements from this rank's part."""
        return local

    def aligned(self, grad: Tensor) -> Tensor:
        """This rank's part of a gradient that autograd gives. Collective in the mesh of a DTensor that is not cut as the
        parameter is."""
        return grad

    def align_gradients(self) -> None:
        """From now on, let gradients arrive cut as the parameter is. To be called before other hooks are registered."""

    def local_part(self, value: Tensor) -> Tensor:
        """This rank's part of a tensor that belongs to the parameter, such as a moment of its optimizer.

        Raises:
            StateError: it is cut in another way than the parameter.
        """
        return value

    @property
    def is_whole(self) -> bool:
        """Whether one rank steps all of it, in its own shape."""
        return self.grain is not Grain.ELEMENT

    @property
    def whole_cost(self) -> int | None:
        """What it costs to step it whole, in comparison with others; None where it is not.

        Its number of elements, and for matrices times the smaller side, as for the products of Newton-Schulz iterations
        (what has more dimensions counts as a matrix of its first one by the rest).
        """
        if not self.is_whole:
            return None
        if self.grain is Grain.PARAMETER or len(self.shape) < 2 or self.numel == 0:
            return self.numel
        rows = self.shape[0]
        return self.numel * min(rows, self.numel // rows)

    @property
    def flat_layout(self) -> FlatLayout:
        """In which order its elements lie in the bucket, and where they are in the whole of a DTensor."""
        return FlatLayout.of(self.shape, self.stride)

    def view_in(self, full: Tensor) -> Tensor:
        """The parameter's shape (and memory format) over its range of a flat buffer of its bucket."""
        return full.as_strided(self.shape, self.stride, full.storage_offset() + self.offset)

    def flatten(self, value: Tensor) -> Tensor:
        """Elements of a tensor of the parameter's shape in the order in which they lie in the bucket, 1-D."""
        if value.stride() != self.stride:
            value = torch.empty_strided(self.shape, self.stride, dtype=value.dtype, device=value.device).copy_(value)
        return value.as_strided((self.numel,), (1,))


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
        layout: _C.BucketPlan,
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
        self._state_dtype = precision.sum_dtype(self.dtype, shard_state=True)
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

    def cut_segments(self, pieces: Sequence[_C.Segment], params: Sequence[ManagedParam]) -> None:
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


def make_plan(
    params: Sequence[ManagedParam], world_size: int, bucket_bytes: int, precision: Precision, *, shard_state: bool
) -> _C.Plan:
    """Plan buckets for parameters in the model's order; those of one dtype, device and number of copies share buckets.

    With `shard_state`, whole parameters lie in one slice each. (Without, every rank steps all slices.)
    """
    dtypes = [precision.stored_dtype(p.param.dtype) for p in params]
    kinds: dict[tuple[torch.dtype, torch.device, int], int] = {}
    kind_of = [kinds.setdefault((d, p.param.device, p.copies), len(kinds)) for d, p in zip(dtypes, params, strict=True)]
    return _C.Plan(
        [p.numel for p in params],
        kind_of,
        [dtype.itemsize for dtype in dtypes],
        world_size,
        precision.alignment,
        bucket_bytes,
        [p.whole_cost if shard_state else None for p in params],
    )


def own_segments(plan: _C.Plan, bucket: int, transport: Transport, *, shard_state: bool) -> list[_C.Segment]:
    """The planned segments of a bucket that this rank steps."""
    return plan.segments(bucket, *_own_range(plan, bucket, transport, shard_state=shard_state))


def _own_range(plan: _C.Plan, bucket: int, transport: Transport, *, shard_state: bool) -> tuple[int, int]:
    if not shard_state:
        return 0, plan.buckets[bucket].padded_numel
    begin = transport.slice_index * plan.shard_numel(bucket)
    return begin, begin + plan.shard_numel(bucket)


def make_buckets(
    plan: _C.Plan,
    params: Sequence[ManagedParam],
    transport: Transport,
    precision: Precision,
    *,
    shard_state: bool,
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
        own_range = _own_range(plan, number, transport, shard_state=shard_state)
        bucket = Bucket(first_index + number, layout, params, own_range, transport, precision, shared=shared)
        bucket.cut_segments(plan.segments(number, *own_range), params)
        buckets.append(bucket)
    return buckets
