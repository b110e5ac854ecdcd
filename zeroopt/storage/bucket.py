"""Flat storage: the parameters of a bucket are parts of one buffer, and so are the pieces of them that this rank owns.

A bucket may be a layout alone: gradients can be put together by it before the parameters move into it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .._C import BucketPlan, Plan
from .._C import Segment as PlannedSegment
from ..collectives import Transport
from ..options.precision import Precision
from ..own_storage import with_own_storage
from ..pages import release, trim_heap
from ..plan.ownership import Ownership
from ..plan.params import ManagedParam
from ..plan.redistribution import Redistribution
from ..streams import has_streams
from .masters import Master, make_master
from .segment import Segment, view_of

# Elements that are rounded at once: what that takes besides, about 16 bytes each, is then small beside a bucket.
SET_AT_ONCE = 1 << 19


class Bucket:
    """Parameters of one dtype side by side in one flat buffer, cut into one slice a rank.

    At first it is a layout alone: its buffer, and what is as large, are on the meta device, and the parameters are somewhere else.
    Gradients can be put together by it. `hold_params` gives it memory and moves the parameters there: `param.data` becomes a part
    of it. The values stay, or are rounded to `dtype`; what rounding takes from the own range, the master keeps.

    Attributes:
        name: how messages call the bucket.
        precision: what its parameters are kept in.
        flat_param: [padded_numel], all parameters; the gaps between them are zero.
        own_range: the elements of the bucket that this rank steps; its slice, all of the bucket in stage 0, or the whole
            parameters that it owns.
        moves: what travels between slices and own ranges; None where own ranges are slices, or all of the bucket.
        own_param: view of `flat_param` over the own range.
        home: the device where the own range is stepped.
        master: the exact values of the own range.
        segments: the pieces of parameters in the own range.
        gaps: first and last element, plus one, of what lies between and behind the parameters.
        norm_weight: what its gradients count for in a sum over all ranks that hold parts of the model.
    """

    def __init__(
        self,
        index: int,
        layout: BucketPlan,
        pieces: Sequence[PlannedSegment],
        params: Sequence[ManagedParam],
        own_range: tuple[int, int],
        precision: Precision,
        *,
        home: torch.device | None,
        moves: Redistribution | None = None,
    ) -> None:
        self.index = index
        self.moves = moves
        self.precision = precision
        self.padded_numel: int = layout.padded_numel
        self.params: list[ManagedParam] = [params[i] for i in layout.params]
        self.dtype: torch.dtype = precision.stored_dtype(self.params[0].param.dtype)
        self.device: torch.device = self.params[0].param.device
        self.home: torch.device = self.device if home is None else home
        self.norm_weight: float = 1.0 / self.params[0].copies
        self._offset_of = dict(zip(self.params, layout.offsets, strict=True))
        self.gaps: list[tuple[int, int]] = self._find_gaps()
        self.name: str = f"bucket {self.index} ({self.params[0].name} … {self.params[-1].name})"
        self.own_range = own_range
        self._pieces = [(params[piece.param], piece) for piece in pieces]
        self._state_dtype = precision.sum_dtype(self.dtype, by_slices=True)
        self._lie_in(torch.empty(self.padded_numel, dtype=self.dtype, device="meta"), home=None)

    def _lie_in(self, flat_param: Tensor, home: torch.device | None) -> None:
        self.flat_param: Tensor = flat_param
        self.own_param: Tensor = self.within_own_range(flat_param)
        self.master: Master = make_master(self.own_param, self.precision, home)
        self.segments: list[Segment] = [
            Segment(owner, piece.start, piece.offset, piece.numel, self._shard_of(owner, piece), self._state_dtype)
            for owner, piece in self._pieces
        ]

    def _shard_of(self, owner: ManagedParam, piece: PlannedSegment) -> nn.Parameter:
        assert not owner.is_whole or piece.numel == owner.numel
        return nn.Parameter(with_own_storage(view_of(self.master.stepped, owner, piece.offset, piece.numel)))

    @property
    def key(self) -> int:
        """What tells its random numbers from those of others: the same on all ranks that hold copies of its parameters, however many
        buckets these have of other parameters besides, as with uneven DTensors."""
        return min((managed.index for managed in self.params), default=0)

    def offset_of(self, managed: ManagedParam) -> int:
        """Where in this bucket a parameter lies, or is to lie."""
        return self._offset_of[managed]

    def place_params(self) -> None:
        """Let the parameters' offsets be those in this bucket, where they, or their gradients, are to lie."""
        for managed in self.params:
            managed.offset = self._offset_of[managed]

    def hold_params(self, transport: Transport, *, shared: bool, leave: bool = False) -> None:
        """Get memory, and move the parameters into it. Collective.

        Args:
            shared: the ranks of a host get the same bucket, with the values of the first of them.
            leave: the parameters come from other buckets, which on the CPU give back the pages that they leave. What completes
                them moves by itself: see `Master.arrays`.
        """
        self._lie_in(transport.allocate(self.padded_numel, self.dtype, self.device, shared=shared), self.home)
        self.place_params()
        writes = transport.writes_parameters or not shared
        for managed in self.params:
            before = managed.local
            if leave:
                self._take_over(managed, before, writes=writes)
            elif managed.has_memory:
                self.set_exact(managed, before, writes=writes)
            managed.set_local(managed.view_in(self.flat_param))

    def _take_over(self, managed: ManagedParam, before: Tensor, *, writes: bool) -> None:
        """Copy a parameter from where it was in another bucket, rounded already."""
        if writes:
            managed.view_in(self.flat_param).copy_(before)
            release(managed.flatten(before))

    def set_exact(self, managed: ManagedParam, values: Tensor, *, writes: bool) -> None:
        """Give a parameter exact values: what rounding them takes away goes into the master where this rank steps it.

        Args:
            values: of the parameter's shape.
            writes: whether this rank writes the bucket's parameters; one of a host does where they are shared.
        """
        for first, piece in pieces_of(managed, values):
            self.set_piece(first, piece, writes=writes)

    def set_piece(self, first: int, values: Tensor, *, writes: bool) -> None:
        """Likewise for elements of the bucket from `first` on, 1-D."""
        last = first + values.numel()
        if writes:
            self.flat_param[first:last].copy_(self.master.round(values))
        begin, end = max(first, self.own_range[0]), min(last, self.own_range[1])
        if begin < end:
            within = self.own_range[0]
            self.master.keep(begin - within, end - within, values[begin - first : end - first])

    def release(self, gone: Collection[ManagedParam]) -> None:
        """Let parameters have memory of their own again. They leave gaps, of whatever values, that nobody steps."""
        for managed in self.params:
            if managed in gone:
                managed.set_local(torch.empty_like(managed.local).copy_(managed.local))
        self.params = [managed for managed in self.params if managed not in gone]
        self.gaps = self._find_gaps()
        self.segments = [segment for segment in self.segments if segment.owner not in gone]

    def free(self, transport: Transport) -> None:
        """Give up the flat buffer; its memory goes when the last parameter has moved out of it."""
        transport.free(self.flat_param)
        self.segments.clear()
        self.flat_param = self.own_param = self.flat_param.new_empty(0)
        self.master = make_master(self.own_param, self.precision)

    def within_own_range(self, full: Tensor) -> Tensor:
        """The own range of a flat buffer of this bucket, a view."""
        return full[self.own_range[0] : self.own_range[1]]

    def zero_gaps(self, full: Tensor) -> None:
        """Clear what lies between and behind the parameters in a buffer that has been used for another bucket."""
        if len(self.gaps) > 1 and has_streams(full.device):  # where a launch costs more than the bytes
            full.zero_()
            return
        for begin, end in self.gaps:
            full[begin:end].zero_()

    def _find_gaps(self) -> list[tuple[int, int]]:
        begins = [self._offset_of[managed] for managed in self.params]
        ends = [begin + managed.numel for begin, managed in zip(begins, self.params, strict=True)]
        borders = zip([0, *ends], [*begins, self.padded_numel], strict=True)
        return [(end, begin) for end, begin in borders if begin > end]


def pieces_of(managed: ManagedParam, values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The values of a parameter, a view, and where in its bucket they begin: at most `SET_AT_ONCE` elements at a time."""
    flat = managed.flatten(values)
    for start in range(0, managed.numel, SET_AT_ONCE):
        yield managed.offset + start, flat[start : start + SET_AT_ONCE]


def lay_out_buckets(
    plan: Plan,
    params: Sequence[ManagedParam],
    ownership: Ownership,
    precision: Precision,
    *,
    home: torch.device | None,
    first_index: int = 0,
) -> list[Bucket]:
    """The buckets of a plan, as layouts alone.

    Args:
        params: those that the plan is for, in its order.
        home: where this rank steps what is its own; None: where the parameters are.
        first_index: index of the first of the buckets, which come behind others of the model.
    """
    if ownership.has_all:  # nothing travels
        precision = replace(precision, parameter_compression=None)
    buckets = []
    for number, layout in enumerate(plan.buckets):
        own_range = ownership.stepped(plan, number)
        pieces = plan.segments(number, *own_range)
        moves = ownership.redistribution(plan, number)
        buckets.append(
            Bucket(first_index + number, layout, pieces, params, own_range, precision, home=home, moves=moves)
        )
    return buckets


def fill_buckets(buckets: Iterable[Bucket], transport: Transport, *, shared: bool) -> None:
    """Move parameters into buckets that are layouts so far, one bucket after the other, so that only one bucket exists twice at a time.

    Collective. With `shared`, the ranks of a host get the same buckets, with the values of the first of them. When the values are
    there, masters have to `fetch` them.
    """
    for bucket in buckets:
        bucket.hold_params(transport, shared=shared)
        if bucket.device.type == "cpu":
            trim_heap()  # of where the parameters were
