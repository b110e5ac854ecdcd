"""From autograd to reduced gradients: hooks fill buckets, and full buckets start to travel while backward goes on.

A parameter's hook copies its gradient, scaled by 1/world_size, into its bucket and frees it. The last one in completes the
bucket. Buckets start to travel in the order of their index on every rank, whatever the order in which they were completed,
so that all ranks start the same collectives in the same order. When backward ends, what has not arrived on this rank (a
parameter that this rank did not use) counts as zero, and the remaining buckets start.

Which parameters had a gradient on any rank is agreed with one small collective a backward: those without stay untouched by
the step, as under DistributedDataParallel with find_unused_parameters.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import MutableMapping, Sequence
from functools import partial

import torch
from torch import Tensor

from . import _C, ops
from .audit import Audit
from .bucket import Bucket, ManagedParam, ParamState
from .collectives import ADVICE, PendingCollective, Transport
from .config import Placement
from .errors import CollectiveError, StateError
from .grad_clip import note_norm
from .gradient_store import BufferPool, GradientStore
from .lockstep import Lockstep
from .precision import Precision
from .profiling import named_range

_GRADIENT = "zeroopt.gradient"  # its name among a segment's state, while buckets are planned anew


def _on_gradient(reducer: weakref.ref[GradientReducer], index: int, _: Tensor) -> None:
    """The hook of one parameter. It runs between two kernels of the user's, so it does as little as it can.

    Autograd keeps it where the garbage collector does not look, so it must not keep parameters or the reducer alive.
    """
    owner = reducer()
    if owner is not None:
        owner.take_up(index)


def _dense_gradient(managed: ManagedParam) -> Tensor:
    """A parameter's gradient, its elements in memory as those of the parameter are."""
    grad = managed.param.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise StateError(
            f"parameter {managed.name!r} has a sparse gradient, which buckets cannot hold; "
            "build its embedding with sparse=False"
        )
    if grad.is_neg():
        grad = grad.resolve_neg()
    if grad.stride() != managed.stride:
        grad = torch.empty_like(managed.param, dtype=grad.dtype).copy_(grad)
    return grad


class GradientReducer:
    """Fills, starts and finishes the gradient buckets of one wrapped model.

    Attributes:
        sync: False within `no_sync()`: gradients stay where autograd puts them, in `param.grad`.
        has_local_gradients: a backward under `no_sync()` has left gradients that no reduce has taken up yet.
        stores: the gradients of each bucket.
        num_steps: steps that have been taken.
        norm_type: p, when gradients are clipped by their p-norm: each bucket's share of it is computed when its sum is done.
        audit: looks at gradients in some steps; None: in none.
        arrivals: parameters in the order in which the last backward yielded their gradients, by index.
    """

    def __init__(
        self,
        params: Sequence[ManagedParam],
        buckets: Sequence[Bucket],
        transport: Transport,
        placement: Placement,
        *,
        overlap: bool,
        bucket_buffers: int,
        reduce_dtype: torch.dtype | None,
        precision: Precision,
    ) -> None:
        self.sync = True
        self.has_local_gradients = False
        self.num_steps = 0
        self.norm_type: float | None = None
        self.audit: Audit | None = None
        self.arrivals: list[int] = []
        self._params = params
        self._transport = transport
        self._placement = placement
        self._overlap = overlap
        self._bucket_buffers = bucket_buffers
        self._reduce_dtype = reduce_dtype
        self._precision = precision
        self._scale = 1.0 / transport.world_size
        self._running = False  # between the first hook of a backward and its end
        self._arrived = bytearray(len(params))  # 1: its gradient has come, for this backward
        self._packed = bytearray(len(params))  # 1: and lies in the bucket; until then in param.grad
        self._in_flight: deque[GradientStore] = deque()  # in the order of their start
        self._lent: deque[GradientStore] = deque()  # reduced, but other ranks may still read their full buffers
        self._gathers: list[tuple[str, PendingCollective]] = []  # and how messages call their buckets
        # What ranks compare after a backward: which parameters had a gradient, and how far each rank is.
        self._lockstep = Lockstep(transport.rank, transport.world_size)
        self._flags = transport.allocate(len(params) + self._lockstep.num_bytes, torch.uint8, buckets[0].device)
        self._flags_before: PendingCollective | None = None
        self._pending_flags: list[tuple[Tensor, PendingCollective]] = []
        self._used = torch.zeros(len(params), dtype=torch.uint8)
        for managed in params:
            hook = partial(_on_gradient, weakref.ref(self), managed.index)
            managed.param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self.adopt(buckets)

    def adopt(self, buckets: Sequence[Bucket]) -> None:
        """Take up buckets in which the same parameters lie. Collective. No gradients are kept."""
        assert not self._in_flight and not self._running
        self._lent.clear()
        self._pool = None
        if self._placement.shard_gradient:
            count = self._bucket_buffers if self._overlap else 1
            self._pool = BufferPool(buckets, self._reduce_dtype, self._transport, count)
        self._buckets = buckets
        self.stores = [
            GradientStore(bucket, self._placement, self._reduce_dtype, self._transport, self._pool, self._precision)
            for bucket in buckets
        ]
        # Buckets that travel while another one fills. Stage 0 has to wait for its reduces in any case, to gather them.
        bounded = self._transport.needs_staging or not self._placement.shard_state
        most = max(1, self._bucket_buffers - 1) if bounded else len(buckets)
        self._max_in_flight = most if self._overlap else 0
        self._addresses = [managed.param.data_ptr() for managed in self._params]
        self._missing = [len(bucket.params) for bucket in buckets]
        self._next = 0  # the bucket that starts next
        self._bucket_of = [0] * len(self._params)
        for bucket in buckets:
            for managed in bucket.params:
                self._bucket_of[managed.index] = bucket.index

    def hand_over(self, state: MutableMapping[Tensor, ParamState]) -> None:
        """Put the reduced gradients of this rank's segments into their state, to move with it."""
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            for segment in bucket.segments if store.holds_sum else ():
                piece = store.reduced[segment.offset : segment.offset + segment.numel]
                state.setdefault(segment.shard, {})[_GRADIENT] = piece

    def take_back(self, state: MutableMapping[Tensor, ParamState]) -> None:
        """Take the gradients out of the state again."""
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            for segment in bucket.segments:
                entry = state.get(segment.shard, {})
                if _GRADIENT in entry:
                    store.reduced[segment.offset : segment.offset + segment.numel].copy_(entry.pop(_GRADIENT))
                    store.holds_sum = True
                    if not entry:
                        del state[segment.shard]
        if not self._placement.shard_state:
            self._show_moved_gradients()

    def _show_moved_gradients(self) -> None:
        """Stage 0: `param.grad` is in the new buffers."""
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            for managed in bucket.params:
                if managed.param.grad is not None:
                    assert store.full is not None
                    view = managed.view_in(store.full)
                    managed.param.grad = view.copy_(managed.param.grad)

    def let_go(self) -> None:
        """Free all buffers, before others are adopted."""
        for store in self.stores:
            store.let_go(self._transport)
        if self._pool is not None:
            self._pool.let_go(self._transport)
        self.stores = []
        self._pool = None

    @property
    def used(self) -> Tensor:
        """uint8 [number of parameters]: 1 where any rank had a gradient since `discard`. Valid after `finish`."""
        return self._used

    def finish(self) -> None:
        """Wait until every gradient that has been produced is reduced. Collective when a backward has run.

        Raises:
            StateError: the last backward raised before it was through.
            CollectiveError: another rank did not do its part.
        """
        if self._running:
            self._transport.give_up("its backward raised")
            raise StateError(
                "the last backward did not come to its end, so the ranks no longer agree on what has been reduced; start "
                "the job again from a checkpoint"
            )
        while self._in_flight:
            self._finish_oldest()
        self._transport.flush()
        for label, gather in self._gathers:
            with named_range("wait_for_gather", label):
                gather.finish()
        self._gathers.clear()
        for flags, pending in self._pending_flags:
            with named_range("wait_for_used"):
                pending.finish()
            flags = flags.cpu()
            difference = self._lockstep.difference(flags[len(self._params) :].tolist())
            if difference is not None:
                self._transport.give_up("ranks have diverged")
                raise CollectiveError(
                    f"transport {self._transport.name}: the ranks have diverged: {difference}. So the gradients of "
                    f"{self._buckets[0].name} and all that follow belong to different steps. {ADVICE}"
                )
            self._used |= flags[: len(self._params)]
        self._pending_flags.clear()

    def reclaim(self) -> None:
        """After the step: where gradients go by messages, wait for the last of them. Theirs is memory that nothing else frees."""
        if self._transport.needs_staging:
            for store in self.stores:
                store.reclaim()
            self._lent.clear()

    def discard(self) -> None:
        """Forget all gradients, reduced and local."""
        self.finish()
        for store in self.stores:
            store.discard()
        self._used.zero_()
        self.has_local_gradients = False
        if self.audit is not None:
            self.audit.forget()

    def zero(self) -> None:
        """Set all reduced gradients to zero; parameters that had one count as having one still."""
        self.finish()
        for store in self.stores:
            store.zero()
        self.has_local_gradients = False
        if self.audit is not None:
            self.audit.forget()

    def take_visible(self) -> Tensor:
        """Stage 0: what `param.grad` says holds, for the user may have cleared, replaced or edited it.

        Returns:
            uint8 [number of parameters], 1 where there is a gradient.
        """
        flags = bytearray(len(self._params))
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            assert store.full is not None
            for managed in bucket.params:
                grad = managed.param.grad
                if grad is None:
                    continue
                flags[managed.index] = 1
                view = managed.view_in(store.full)
                if grad.data_ptr() != view.data_ptr():
                    view.copy_(grad)
        return torch.frombuffer(flags, dtype=torch.uint8)

    def check_storage(self) -> None:
        """Raise StateError when a parameter no longer lies in its bucket."""
        for managed, address in zip(self._params, self._addresses, strict=True):
            if managed.param.data_ptr() != address:
                raise StateError(
                    f"parameter {managed.name!r} no longer lies in zeroopt's storage: the model was moved, cast or "
                    f"given new data after zeroopt.wrap (it is now {managed.param.dtype} on {managed.param.device}). "
                    "Move and cast the model first, then wrap it; to load values use load_state_dict or copy_"
                )

    def take_up(self, index: int) -> None:
        """A parameter's gradient is complete in `param.grad`, for this backward."""
        if not self.sync:
            self.has_local_gradients = True
            return
        if not self._running:
            self._begin()
        managed, bucket = self._params[index], self._bucket_of[index]
        if self._arrived[index]:
            self._transport.give_up("its backward raised")
            raise StateError(
                f"the gradient of {managed.name!r} arrived twice in one backward; if an earlier backward raised, the "
                "ranks no longer agree on what has been reduced: start the job again from a checkpoint"
            )
        self._arrived[index] = 1
        self.arrivals.append(index)
        full = self._open(bucket)
        if full is not None:
            self._pack(managed, full)
        self._missing[bucket] -= 1
        if self._missing[bucket] == 0:
            self._start_complete()

    def _begin(self) -> None:
        self.check_storage()
        while self._in_flight:  # left by the backward before: its buckets are about to be filled again
            self._finish_oldest()
        self._running = True
        self.arrivals.clear()
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _open(self, bucket: int) -> Tensor | None:
        """The full buffer of a bucket, or None: its gradients then stay where they are until it is the bucket's turn.

        The last free buffer is for the bucket that starts next, since no other one can start before it and become free.
        """
        store, next_store = self.stores[bucket], self.stores[self._next]
        if self._pool is None or store.is_open:
            return store.open()
        if store is next_store:
            while self._pool.num_free == 0:
                self._reclaim_oldest()
        elif self._pool.num_free <= (0 if next_store.is_open else 1):
            return None
        if store in self._lent:  # of the backward before; opening reclaims it
            self._lent.remove(store)
        return store.open()

    def _reclaim_oldest(self) -> None:
        if not self._lent:
            self._finish_oldest()
        store = self._lent.popleft()
        with named_range("wait_until_read", store.label):
            store.reclaim()

    def _pack(self, managed: ManagedParam, full: Tensor) -> None:
        """Move a gradient into its bucket."""
        grad = _dense_gradient(managed)
        if grad.is_cpu:
            code = ops.DTYPE_CODES[grad.dtype]
            address = full.data_ptr() + managed.offset * full.element_size()
            numel, threads = managed.numel, torch.get_num_threads()
            _C.pack(grad.data_ptr(), code, address, ops.DTYPE_CODES[full.dtype], numel, self._scale, threads)
        else:
            ops.pack(grad, managed.view_in(full), scale=self._scale)
        self._note_packed(managed, full)

    def _pack_together(self, waiting: Sequence[ManagedParam], full: Tensor) -> None:
        """Move gradients into their bucket in one call for each dtype, which is one unless a user has set others."""
        grads = {managed.index: _dense_gradient(managed) for managed in waiting}
        for dtype in {grad.dtype for grad in grads.values()}:
            alike = [managed for managed in waiting if grads[managed.index].dtype is dtype]
            sources = [grads[managed.index] for managed in alike]
            ops.pack_segments(sources, [managed.view_in(full) for managed in alike], scale=self._scale)
        for managed in waiting:
            self._note_packed(managed, full)

    def _note_packed(self, managed: ManagedParam, full: Tensor) -> None:
        # Stages 1 and 2 free it here, which is what keeps full gradients from ever existing side by side.
        managed.param.grad = None if self._placement.shard_state else managed.view_in(full)
        self._packed[managed.index] = 1

    def _start_complete(self) -> None:
        while self._next < len(self._buckets) and self._missing[self._next] == 0:
            self._start_next()
        self._transport.progress()

    def _start_next(self) -> None:
        """Let the next bucket travel, once it is full: with what has not been packed so far, and zeros for the rest."""
        bucket, store = self._buckets[self._next], self.stores[self._next]
        full = self._open(bucket.index)
        assert full is not None
        late = [managed for managed in bucket.params if not self._packed[managed.index]]
        # Those had no buffer when they came, or were left by a backward under no_sync().
        waiting = [managed for managed in late if managed.param.grad is not None]
        if waiting:
            with named_range("pack", store.label):
                self._pack_together(waiting, full)
        for managed in late:
            if not self._packed[managed.index]:
                full[managed.offset : managed.offset + managed.numel].zero_()
        while self._in_flight and len(self._in_flight) >= self._max_in_flight:
            self._finish_oldest()
        if self.audit is not None and self.audit.is_due(self.num_steps):
            self.audit.look_at(bucket, full)
        with named_range("reduce_scatter", store.label):
            store.start_reduce(self._transport)
        self._in_flight.append(store)
        self._next += 1
        if self._max_in_flight == 0:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        store = self._in_flight[0]
        with named_range("wait_for_reduce", store.label):
            store.finish()  # when it fails, it is still the oldest
        self._in_flight.popleft()
        if self.norm_type is not None:
            note_norm(store, self.norm_type)
        if not self._placement.shard_state:  # stage 0: an all-reduce is a reduce-scatter and an all-gather
            assert store.full is not None
            with named_range("all_gather", store.label):
                self._gathers.append((store.label, self._transport.start_all_gather(store.full, label=store.label)))
        if self._pool is not None:
            self._lent.append(store)

    def _end(self) -> None:
        """Autograd calls this when backward is through."""
        while self._next < len(self._buckets):
            self._start_next()
        with named_range("agree_on_used"):
            self._agree_on_used()
        self._arrived = bytearray(len(self._params))
        self._packed = bytearray(len(self._params))
        self._missing = [len(bucket.params) for bucket in self._buckets]
        self._next = 0
        self._running = False
        self.has_local_gradients = False
        self._transport.progress()
        if not self._placement.shard_state:
            self.finish()
            self._show_gradients()

    def _agree_on_used(self) -> None:
        if self._flags_before is not None:
            self._flags_before.finish()
            self._flags_before.wait_until_read()
        flags = self._packed + self._lockstep.note_backward(self.num_steps)
        self._flags.copy_(torch.frombuffer(flags, dtype=torch.uint8))
        agreed = torch.empty_like(self._flags)
        self._flags_before = self._transport.start_max(self._flags, agreed, label="used parameters")
        self._pending_flags.append((agreed, self._flags_before))

    def _show_gradients(self) -> None:
        """Stage 0: a parameter that another rank used has a gradient here as well."""
        used = self._used.tolist()
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            for managed in bucket.params:
                if managed.param.grad is None and used[managed.index]:
                    assert store.full is not None
                    managed.param.grad = managed.view_in(store.full)
