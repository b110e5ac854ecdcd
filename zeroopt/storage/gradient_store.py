"""Where the gradients of a bucket lie: while backward fills them in, while they travel, and after their reduce.

stage 0   one full buffer a bucket, for good; after the all-reduce `param.grad` is its part of it
stage 1   one full buffer a bucket, for good; the own slice of it holds the sum after the reduce-scatter
stage 2   a full buffer borrowed from a pool until its reduce-scatter has been read; the sum goes to a buffer of one slice,
          which is the same for all buckets where each is stepped before the next one is summed (`step_in_backward`)

In stage 2, a bucket that is larger than the pool's buffers (one huge parameter) travels in stripes: each is a part of every
slice, and its sum the same part of the sum.

Where whole parameters lie across slices (`Bucket.moves`), a sum is there first in the slices, and goes from there to the ranks that
step them.

Full buffers have the dtype of what travels (`Wire.dtype`), sums that of the parameters, or float32 for parameters with a
master. Where the two differ, or what travels is no plain sum, stage 1 keeps its sum apart as stage 2 does.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from .. import ops
from ..collectives import PendingCollective, Transport, Wire
from ..collectives.exchange import Chained
from ..collectives.residual import Residual
from ..own_storage import with_own_storage
from ..pages import paged_zeros_like, release
from ..plan.ownership import Ownership
from ..plan.params import ManagedParam, ParamState
from ..plan.redistribution import Redistribution
from ..streams import ReadByGraphs
from .bucket import Bucket
from .buffer_pool import BufferPool
from .segment import Segment
from .slice_sums import SliceSums
from .square_table import SquareTable
from .stripe import Stripe, cut_in_stripes

_SUM = "sum"  # its name among what moves with a segment


class GradientStore:
    """The gradients of one bucket on this rank.

    Attributes:
        full: [padded_numel], or one stripe, for good; in stage 2 while backward fills it, else None.
        reduced: [own range], the sum over ranks, valid while `holds_sum`.
        base: sum of the earlier backward passes of this step, to which the next reduce adds; None for the first.
        label: how messages call the bucket.
        norm_weight: what its gradients count for in a norm over the whole model.
        factor: 0-dim, what the sum has yet to be multiplied by, to clip or to unscale it; the step does that on its way, so
            that it takes no pass of its own. None: nothing.
        norm: p and the p-norm of `reduced`, without the factor, where somebody has asked for it; see `gradients.norms`.
        storage: how a kernel sees the own range; None: there is none for it.
        squares: by which a kernel sums the squares of this one and of those behind it.
        read_by_graphs: tables that another one may take the place of.
        is_open: backward fills it.
        sum_is_spread: stage 0: every rank is to have the sum of all slices.
        is_reducing: a reduce of it has started, and nobody has waited for it yet.
        stripes: the parts in which it travels, one after the other; mostly one.
        stripe: the one that is open, or is opened next.
        is_striped: there are several.
    """

    def __init__(
        self,
        bucket: Bucket,
        ownership: Ownership,
        wire: Wire,
        transport: Transport,
        pool: BufferPool | None,
        slice_sums: SliceSums | None = None,
    ) -> None:
        self._bucket = bucket
        self._slice_sums = slice_sums or SliceSums()
        self.label: str = bucket.name
        self.norm_weight: float = bucket.norm_weight
        self._pool = pool
        self._wire = wire
        self._dtype = wire.dtype or bucket.dtype
        sum_dtype = bucket.precision.sum_dtype(bucket.dtype, by_slices=ownership.by_slices)
        self._moves = bucket.moves
        self._in_slice: Tensor | None = None  # the sum of this rank's slice, before it goes to those who step it
        plain_sum = self._dtype is sum_dtype and wire.backend_sums
        self._sums_apart = pool is not None or not plain_sum or self._moves is not None
        self.sum_is_spread: bool = not ownership.by_slices
        numel = bucket.padded_numel
        self.stripes: list[Stripe] = (
            cut_in_stripes(numel, transport.num_slices, numel) if pool is None else pool.stripes(bucket)
        )
        self.is_striped: bool = len(self.stripes) > 1
        self._turns = cycle(self.stripes)
        self.stripe: Stripe = next(self._turns)
        # Reduces in the order of their start, with their full buffers, until those have been read; the first so many are through.
        self._pending: deque[tuple[PendingCollective, Tensor]] = deque()
        self._num_finished = 0
        self.holds_sum: bool = False
        self._is_zero = False  # and nobody has been given parts of it to change since
        self._adds_zero = False  # the next reduce does
        self.is_open: bool = False
        self.is_reducing: bool = False
        self.norm: tuple[float, Tensor] | None = None
        self.storage: ops.Storage | None = bucket.precision.storage(bucket.dtype, sum_dtype)
        self.squares: SquareTable | None = None
        self.read_by_graphs: ReadByGraphs = ReadByGraphs()
        self.factor: Tensor | None = None
        self.base: Tensor | None = None
        self.full: Tensor | None = None
        self._shown: dict[ManagedParam, Tensor] = {}
        if pool is None:
            self.full = transport.allocate(bucket.padded_numel, self._dtype, bucket.device)
            if self.sum_is_spread:
                self._shown = {m: with_own_storage(m.view_in(self.full)) for m in bucket.params}
        self.reduced: Tensor
        if self._sums_apart:
            self.reduced = self.allocate_sum(sum_dtype, bucket.device)
        else:
            assert self.full is not None
            self.reduced = bucket.within_own_range(self.full)

    def allocate_sum(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[own range], memory for the sum, there or where it is stepped."""
        own = self._bucket.own_param
        if self._pool is not None and self._pool.lends_sums:
            return self._pool.scratch(own, dtype, device)
        return paged_zeros_like(own, dtype, device)

    @property
    def borrows(self) -> bool:
        """Whether its full buffer is one of a pool's."""
        return self._pool is not None

    @property
    def residual(self) -> Residual | None:
        """What this rank has not sent yet of the gradients that it has had; None where all of them travel as they are."""
        return self._wire.residual

    def open(self) -> Tensor:
        """The full buffer for the gradients of one backward pass, or for the next stripe of them: zero in gaps of a bucket that
        travels at once, undefined elsewhere. What was summed before is kept aside as `base`."""
        if not self.is_open:
            if self.stripe.is_first:
                if self._pending:
                    self.finish()
                    self.reclaim()
                # In stage 0, autograd itself adds to param.grad, a view of `full`.
                if self.holds_sum and not self.sum_is_spread:
                    self._keep_base()
            self.is_open = True
            if self._pool is not None:
                self.full = self._pool.borrow(self.stripe.numel, self._dtype)
                if self._bucket.gaps and not self.is_striped:
                    self._bucket.zero_gaps(self.full)
        assert self.full is not None
        return self.full

    def _keep_base(self) -> None:
        self.settle()
        if self._sums_apart:
            self.base = self.reduced
        elif self._is_zero:
            self._adds_zero = True
        else:
            self.base = self.reduced.clone()

    def start_reduce(self, transport: Transport) -> None:
        """Let the full buffer travel."""
        assert self.full is not None
        out, base = self.reduced if self._sums_apart else transport.own_slice(self.full), self.base
        if self._moves is not None:
            out, base = self._sum_of_slice(), None
        if self.is_striped:
            own = slice(self.stripe.begin, self.stripe.end)
            out, base = out[own], None if base is None else base[own]
        encoded = self._wire.encode(self.full, transport.num_slices)
        pending = transport.start_reduce_scatter(encoded, out, base, wire=self._wire, label=self.label)
        self.stripe = next(self._turns)
        if self._moves is not None and self.stripe.is_first:  # all of the slice is on its way
            pending = Chained(
                pending, partial(self._start_bringing, transport, self._moves), is_queued=transport.is_queued
            )
        self._pending.append((pending, self.full))
        if self._pool is not None:
            self.full = None
        self.is_open = False
        self.is_reducing = True
        self.holds_sum = False
        self._is_zero = False
        self.norm = None
        self.factor = None

    def _sum_of_slice(self) -> Tensor:
        """[slice], memory for its sum, in which nothing is rounded yet."""
        if self._in_slice is None:
            wide = self._dtype if self._dtype in (torch.float32, torch.float64) else torch.float32
            self._in_slice = self._slice_sums.take(self.stripe.slice_numel, wide, self._bucket.device)
        return self._in_slice

    def _start_bringing(self, transport: Transport, moves: Redistribution) -> PendingCollective:
        """Bring the sum to the ranks that step it."""
        assert self._in_slice is not None
        begin, end = moves.slice_range
        memory, self._in_slice = self._in_slice, None
        source, sums = memory[: end - begin], self._slice_sums
        is_sum = self.base is None and self.reduced.dtype is source.dtype
        target = self.reduced if is_sum else sums.take(self.reduced.numel(), source.dtype, source.device)
        exchange = transport.exchange.start(source, target, moves.to_owners, moves.from_slices, label=self.label)
        return _Brought(exchange, sums, memory, None if is_sum else (target, self.base), self.reduced)

    def finish_next(self, *, wait: bool = True) -> None:
        """Wait for the reduce that was started first; with the last one, `reduced` holds the sum.

        Args:
            wait: False: who uses it comes behind it anyway.
        """
        if wait:
            self._pending[self._num_finished][0].finish()
        self._num_finished += 1
        if self._num_finished == len(self._pending):
            self.is_reducing = False
            if self.stripe.is_first:
                self.base = None
                self.holds_sum = True
                if self._adds_zero:
                    self._adds_zero = False
                    self.reduced.add_(0.0)  # -0 becomes 0, as it would beside a base of zeros

    def finish(self) -> None:
        """Wait until `reduced` holds the sum."""
        while self.is_reducing:
            self.finish_next()

    def gradient_of(self, managed: ManagedParam) -> Tensor:
        """Stage 0: a parameter's gradient in the full buffer, as `param.grad` shows it; an object of its own each time, whose version
        counts what is done to it from here on."""
        return self._shown[managed].data

    def reclaim_next(self) -> None:
        """Wait until no rank reads the full buffer any more whose reduce was finished first; a borrowed one goes back."""
        assert self._num_finished
        pending, full = self._pending[0]
        pending.wait_until_read()
        self._pending.popleft()
        self._num_finished -= 1
        if self._pool is not None:
            self._pool.give_back(full)

    def reclaim(self) -> None:
        """After `finish`: likewise for all of them."""
        while self._pending:
            self.reclaim_next()

    def free(self, transport: Transport) -> None:
        """Give up the full buffer of stages 0 and 1."""
        self.reclaim()
        if self.full is not None:
            transport.free(self.full)
            self.full = None
            self._shown.clear()

    def discard(self) -> None:
        """Forget the sum; the next backward starts a new one."""
        self.holds_sum = False
        self.norm = None
        self.factor = None

    def zero(self) -> None:
        """Set the sum to zero."""
        self.reduced.zero_()
        self._is_zero = True
        self.norm = None
        self.factor = None

    def clear(self, managed: ManagedParam) -> None:
        """Set the elements of a parameter to zero, which leaves the bucket. Nothing may be on its way."""
        begin, end = self._bucket.own_range
        first, last = max(managed.offset, begin), min(managed.offset + managed.numel, end)
        if first < last:
            self.reduced[first - begin : last - begin].zero_()
        if self.full is not None:
            self.full[managed.offset : managed.offset + managed.numel].zero_()
        if self.residual is not None:
            self.residual.clear(managed.offset, managed.offset + managed.numel)
        self.norm = None
        self._shown.pop(managed, None)

    def settle(self) -> None:
        """Multiply the sum by its factor now."""
        if self.factor is not None:
            self.reduced.mul_(self.factor)  # not in the dtype of `reduced`, which may have few digits
            self.factor = None
            self.norm = None
            self._is_zero = False

    @property
    def can_be_in_table(self) -> bool:
        """Whether a kernel can sum the squares of `reduced`."""
        bucket = self._bucket
        is_apart = bucket.master.is_away or bucket.own_param.is_meta
        has_some = self.reduced.numel() > 0
        return self.storage is not None and has_some and not is_apart and ops.has_kernels(self.reduced.device)

    def in_table(self) -> ops.SegmentArrays:
        """What a kernel's table has of it, where it can be in one."""
        param, master = self._bucket.master.kernel_arrays
        return ops.SegmentArrays(param, self.reduced, master)

    def clear_part(self, segment: Segment) -> None:
        """Let the sum of a segment's gradients be zero."""
        segment.view_in(self.reduced).zero_()
        self.norm = None

    def part_as(self, segment: Segment, dtype: torch.dtype) -> Tensor:
        """The sum for one segment in the shape of its shard and in a dtype, which is that of the sum or wider; not to be
        changed."""
        if self.reduced.dtype is dtype:
            self.settle()
            return segment.view_in(self.reduced)
        part = segment.view_in(self.reduced).to(dtype)
        return part if self.factor is None else part.mul_(self.factor)

    def part(self, segment: Segment) -> Tensor:
        """The sum for one segment of the own range, to be read or changed in place."""
        self.settle()
        self.norm = None
        self._is_zero = False
        return self.reduced[segment.offset : segment.offset + segment.numel]

    def arrays(self, segment: Segment) -> ParamState:
        """The sum for one segment, where there is one."""
        return {_SUM: self.part(segment)} if self.holds_sum else {}

    def forget(self, segment: Segment) -> None:
        """It goes with the store."""

    def let_go(self) -> None:
        """The sum is zero from now on, where it has memory of its own."""
        if self._sums_apart and not (self._pool is not None and self._pool.lends_sums):
            release(self.reduced)
            self.discard()

    def take(self, segment: Segment, arrays: ParamState) -> None:
        """Let what another store has held be the sum for one segment."""
        if not self.holds_sum:
            self.zero()  # what else lies there is of an earlier step
            self.holds_sum = True
        self.part(segment).copy_(arrays[_SUM])


class _Brought(PendingCollective):
    """A sum that is brought from slices.

    Args:
        sums: to which memory goes back when it is there.
        in_slice: what is brought from here.
        terms: what has come, and an earlier sum or None, whose sum is rounded as `out` is; None: `out` is what comes.
    """

    def __init__(
        self,
        exchange: PendingCollective,
        sums: SliceSums,
        in_slice: Tensor,
        terms: tuple[Tensor, Tensor | None] | None,
        out: Tensor,
    ) -> None:
        self._exchange = exchange
        self._sums = sums
        self._in_slice: Tensor | None = in_slice
        self._terms = terms
        self._out = out

    def finish(self) -> None:
        self._exchange.finish()
        if self._terms is not None:
            brought, base = self._terms
            self._out.copy_(brought if base is None else base.to(brought.dtype) + brought)
            self._sums.give_back(brought)
            self._terms = None
        if self._in_slice is not None:
            self._sums.give_back(self._in_slice)
            self._in_slice = None

    def is_past(self) -> bool:
        return self._exchange.is_past()
