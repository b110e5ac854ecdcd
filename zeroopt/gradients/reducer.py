"""From autograd to reduced gradients: hooks fill buckets, and full buckets start to travel while backward goes on.

A parameter's hook copies its gradient, scaled by 1/world_size, into its bucket and frees it. The last one in completes the
bucket. Buckets start to travel in the order of their index on every rank, whatever the order in which they were completed,
so that all ranks start the same collectives in the same order. When backward ends, what has not arrived on this rank (a
parameter that this rank did not use) counts as zero, and the remaining buckets start.

Which parameters had a gradient on any rank is agreed with one small collective a backward: those without stay untouched by
the step, as under DistributedDataParallel with find_unused_parameters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, MutableMapping, Sequence
from itertools import islice
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _C, ops
from ..collectives import ADVICE, PendingCollective, Transport
from ..errors import CollectiveError, StateError
from ..features.audit import Audit
from ..features.join import Join, Phase
from ..options.config import Placement
from ..parameters.buffers import BufferSync
from ..plan.params import ManagedParam, ParamState
from ..profiling import named_range
from ..storage.broadcast import Broadcaster
from ..storage.bucket import Bucket
from ..storage.gradient_store import BufferPool, GradientStore
from ..untraced import untraced
from .hooks import GradientHook
from .lockstep import Lockstep
from .norms import note_norm
from .sharded_tensor import ShardedGradient
from .sharded_view import ShardedGradients
from .untrained import UntrainedGradients

_GRADIENT = "zeroopt.gradient"  # its name among a segment's state, while buckets are planned anew


def _has_local_gradient(managed: ManagedParam) -> bool:
    """Whether a parameter has a gradient that no reduce has taken up."""
    grad = managed.param.grad
    return grad.local is not None if type(grad) is ShardedGradient else grad is not None


def _dense_gradient(managed: ManagedParam) -> Tensor:
    """A parameter's local gradient, its elements in memory as those of the parameter are."""
    grad = managed.param.grad
    assert grad is not None
    if type(grad) is ShardedGradient:
        grad = grad.take_local()
    else:
        grad = managed.local_grad()
        assert grad is not None
    if grad.layout is not torch.strided:
        raise StateError(
            f"parameter {managed.name!r} has a sparse gradient, which buckets cannot hold; "
            "build its embedding with sparse=False"
        )
    if grad.is_neg():
        grad = grad.resolve_neg()
    if grad.stride() != managed.stride:
        grad = torch.empty_like(managed.local, dtype=grad.dtype).copy_(grad)
    return grad


def _refuse_edit(managed: ManagedParam) -> NoReturn:
    """Something other than a hook of the parameter has changed a gradient after it was taken up."""
    raise StateError(
        f"the gradient of {managed.name!r} was changed while backward ran, after it had been taken up; change gradients when "
        "backward is through, or in a hook on the parameter itself"
    )


class GradientReducer:
    """Fills, starts and finishes the gradient buckets of one wrapped model.

    Attributes:
        sync: False within `no_sync()`: gradients stay where autograd puts them, in `param.grad`.
        stores: the gradients of each bucket.
        join: tells ranks that have run out of data what this one does.
        audit: looks at gradients in some steps; None: in none.
        buffer_sync: sends the model's buffers at the end of each backward; None where they stay as they are.
        sharded: in stages 1 and 2, what `param.grad` is while there is a reduced gradient.
        untrained: the gradients of the model's other parameters.
        num_backwards: backward passes that have been reduced, but for those in which no rank had a gradient.
        is_zeroed: gradients have been set to zero since the last one.
        num_steps: steps that have been taken.
        num_backwards_stepped: `num_backwards` when the last of them was taken, or left out.
        norm_type: p, when gradients are clipped by their p-norm: each bucket's share of it is computed when its sum is done.
        arrivals: parameters in the order in which the last backward yielded their gradients, by index.
    """

    def __init__(
        self,
        module: nn.Module,
        transport: Transport,
        placement: Placement,
        *,
        overlap: bool,
        bucket_buffers: int,
        reduce_dtype: torch.dtype | None,
        mesh_groups: Sequence[dist.ProcessGroup] = (),
    ) -> None:
        self.sync = True
        self.is_zeroed = False
        self.num_steps = 0
        self.num_backwards = 0
        self.num_backwards_stepped = 0
        self.audit: Audit | None = None
        self.buffer_sync: BufferSync | None = None
        self.join = Join(transport)
        self.norm_type: float | None = None
        self.arrivals: list[int] = []
        self._transport = transport
        self._placement = placement
        self._overlap = overlap
        self._bucket_buffers = bucket_buffers
        self._reduce_dtype = reduce_dtype
        self._scale = 1.0
        self._left_local = False  # by a backward under no_sync()
        self._had_gradients = False  # any rank, in the last backward
        self._running = False  # between the first hook of a backward and its end
        self._params: list[ManagedParam] = []
        self._hooks: list[GradientHook] = []
        self._later: list[int] = []  # of gradients that are taken up when backward is through
        self._arrived = bytearray()  # 1: its gradient has come, for this backward
        self._packed = bytearray()  # 1: and lies in the bucket; until then in param.grad
        self._in_flight: deque[GradientStore] = deque()  # in the order of their start
        self._lent: deque[GradientStore] = deque()  # reduced, but other ranks may still read their full buffers
        self._gathers: list[tuple[str, PendingCollective]] = []  # and how messages call their buckets
        # What ranks compare after a backward: which parameters had a gradient, and how far each rank is.
        self._lockstep = Lockstep(transport.rank, transport.world_size)
        self._flags: Tensor | None = None
        self._flags_before: PendingCollective | None = None
        self._pending_flags: list[tuple[Tensor, PendingCollective]] = []
        self._used = torch.zeros(0, dtype=torch.uint8)
        self._pool: BufferPool | None = None
        if placement.shard_gradient:
            self._pool = BufferPool(reduce_dtype, transport, bucket_buffers if overlap else 1)
        self.sharded = (
            ShardedGradients(transport, self.finish, self.join, mesh_groups) if placement.shard_state else None
        )
        self.untrained = UntrainedGradients(module, transport, self._begin_synchronised)
        self._buckets: list[Bucket] = []
        self.stores: list[GradientStore] = []

    def extend(self, params: Sequence[ManagedParam], buckets: Sequence[Bucket]) -> None:
        """Take up further parameters, in buckets of their own. Collective. Gradients that there are stay."""
        self.finish()
        self._reclaim_all()
        for managed in params:
            managed.align_gradients()
            self._hooks.append(GradientHook(self, managed.param, managed.index))
        self._params += params
        self._arrived, self._packed = bytearray(len(self._params)), bytearray(len(self._params))
        self._used = torch.cat([self._used, torch.zeros(len(params), dtype=torch.uint8)])
        self._make_flags(buckets[0].device)
        self._take_in(buckets)

    def remove_hooks(self) -> None:
        """Take up no more gradients. After `discard`."""
        for hook in self._hooks:
            hook.remove()
        self.untrained.remove_hooks()
        self._reclaim_all()

    def clear(self, params: Collection[ManagedParam]) -> None:
        """Before parameters leave their buckets: nothing is on its way, and gaps in gradients are zero. Collective."""
        self.finish()
        self._reclaim_all()
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            for managed in bucket.params:
                if managed in params:
                    store.clear(managed)

    def keep(self, order: Sequence[int]) -> None:
        """Parameters have left their buckets, and the others have new indices. Collective. Their gradients stay.

        Args:
            order: the old indices of the others, in the order of the new ones.
        """
        kept = set(order)
        for hook in self._hooks:
            if hook.index not in kept:
                hook.remove()
        self._hooks = [self._hooks[old] for old in order]
        for new, hook in enumerate(self._hooks):
            hook.index = new
        self._params = [self._params[old] for old in order]
        self._used = self._used[list(order)]
        self._arrived, self._packed = bytearray(len(order)), bytearray(len(order))
        self.arrivals.clear()
        self._make_flags(self._buckets[0].device)
        if self.sharded is not None:
            self.sharded.keep(order)
        if self.audit is not None:
            self.audit.forget()
        sequence = self._sequence
        self._find_places()
        self._set_sequence(sequence)

    def adopt(self, buckets: Sequence[Bucket]) -> None:
        """Take up buckets in which the same parameters lie. Collective. No gradients are kept."""
        assert not self._in_flight and not self._running
        self._lent.clear()
        self._buckets.clear()
        self.stores.clear()
        self._take_in(buckets)

    def start_in_order(self, order: Sequence[int]) -> None:
        """Have buckets travel in the order in which they are complete when gradients come in this order.

        Args:
            order: indices of all parameters, the same on all ranks.
        """
        assert not self._running
        place = {index: position for position, index in enumerate(order)}
        complete = [max((place[managed.index] for managed in bucket.params), default=-1) for bucket in self._buckets]
        self._set_sequence(sorted(range(len(self._buckets)), key=complete.__getitem__))

    def _set_sequence(self, sequence: Sequence[int]) -> None:
        self._sequence = list(sequence)  # of buckets, in which they start
        self._place = {bucket: place for place, bucket in enumerate(sequence)}
        self._next = 0  # place of the bucket that starts next

    def _take_in(self, buckets: Sequence[Bucket]) -> None:
        self._buckets += buckets
        if self._pool is not None:
            self._pool.fit(self._buckets)
        self.stores += [
            GradientStore(bucket, self._placement, self._reduce_dtype, self._transport, self._pool)
            for bucket in buckets
        ]
        # Buckets that travel while another one fills. Stage 0 has to wait for its reduces in any case, to gather them.
        bounded = self._transport.needs_staging or not self._placement.shard_state
        most = max(1, self._bucket_buffers - 1) if bounded else len(self._buckets)
        self._max_in_flight = most if self._overlap else 0
        self._find_places()

    def _find_places(self) -> None:
        """Note where in the buckets each parameter lies."""
        self._addresses = [0] * len(self._params)
        self._missing = [len(bucket.params) for bucket in self._buckets]
        self._set_sequence(range(len(self._buckets)))
        self._bucket_of = [0] * len(self._params)
        for bucket in self._buckets:
            for managed in bucket.params:
                self._bucket_of[managed.index] = bucket.index
                self._addresses[managed.index] = managed.view_in(bucket.flat_param).data_ptr()
        if self.sharded is not None:
            self.sharded.adopt(self._params, self._buckets, self.stores)

    def _make_flags(self, device: torch.device) -> None:
        if self._flags is not None:
            if self._flags_before is not None:
                self._flags_before.wait_until_read()
                self._flags_before = None
            self._transport.free(self._flags)
        self._flags = self._transport.allocate(len(self._params) + self._lockstep.num_bytes, torch.uint8, device)

    def hand_over(self, state: MutableMapping[Tensor, ParamState]) -> None:
        """Put the reduced gradients of this rank's segments into their state, to move with it."""
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            for segment in bucket.segments if store.holds_sum else ():
                state.setdefault(segment.shard, {})[_GRADIENT] = store.part(segment)

    def take_back(self, state: MutableMapping[Tensor, ParamState]) -> None:
        """Take the gradients out of the state again."""
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            for segment in bucket.segments:
                entry = state.get(segment.shard, {})
                if _GRADIENT in entry:
                    store.part(segment).copy_(entry.pop(_GRADIENT))
                    store.holds_sum = True
                    if not entry:
                        del state[segment.shard]
        if not self._placement.shard_state:
            self._show_moved_gradients()

    def _show_moved_gradients(self) -> None:
        """Stage 0: `param.grad` is in the new buffers."""
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            for managed in bucket.params:
                grad = managed.local_grad()
                if grad is not None:
                    managed.set_local_grad(store.gradient_of(managed).copy_(grad))

    def let_go(self) -> None:
        """Free all buffers, before others are adopted."""
        for store in self.stores:
            store.let_go(self._transport)
        if self._pool is not None:
            self._pool.let_go()
        self.stores.clear()

    @property
    def has_local_gradients(self) -> bool:
        """Whether a backward under `no_sync()` has left gradients that no reduce has taken up, and nobody has cleared."""
        if self._left_local and not any(_has_local_gradient(managed) for managed in self._params):
            self._left_local = False
        return self._left_local

    def is_cleared(self, params: Sequence[ManagedParam]) -> bool:
        """Whether these parameters have no gradients, or zeros only."""
        if self.is_zeroed:
            return not self.has_local_gradients
        return all(managed.param.grad is None for managed in params)

    @property
    def used(self) -> Tensor:
        """uint8 [number of parameters]: 1 where any rank had a gradient since `discard`. Valid after `finish`."""
        return self._used

    def sum_dtype(self, index: int) -> torch.dtype:
        """Of a parameter's reduced gradient."""
        return self.stores[self._bucket_of[index]].reduced.dtype

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
        self._finish_flags()

    def _finish_flags(self) -> None:
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
            used = flags[: len(self._params)]
            self._had_gradients = bool(used.any())
            self._used |= used
        self._pending_flags.clear()

    def note_step(self) -> None:
        """A step has been taken."""
        self.num_steps += 1
        self.num_backwards_stepped = self.num_backwards

    def note_skipped_step(self) -> None:
        """A GradScaler has left a step out, on all ranks."""
        self.num_backwards_stepped = self.num_backwards

    def reclaim(self) -> None:
        """After the step: wait for the last messages. Those of gradients hold memory that nothing else frees."""
        if self.buffer_sync is not None:
            self.buffer_sync.wait_for_sent()
        if self._transport.needs_staging:
            self._reclaim_all()

    def _reclaim_all(self) -> None:
        for store in self.stores:
            store.reclaim()
        self._lent.clear()

    def discard(self, buckets: Sequence[Bucket] | None = None) -> None:
        """Forget the gradients, reduced and local, of some buckets or of all."""
        self.finish()
        for bucket in self._buckets if buckets is None else buckets:
            self.stores[bucket.index].discard()
            for managed in bucket.params:
                self._used[managed.index] = 0
                if self.sharded is not None:
                    self.sharded.forget(managed.index)
        if buckets is None:
            self._left_local = False
        if self.sharded is not None:
            self.sharded.changed()
        if self.audit is not None:
            self.audit.forget()

    def zero(self, buckets: Sequence[Bucket] | None = None) -> None:
        """Set the reduced gradients of some buckets, or of all, to zero; parameters that had one count as having one still."""
        self.finish()
        chosen = self._buckets if buckets is None else buckets
        for bucket in chosen:
            self.stores[bucket.index].zero()
            if self.sharded is not None:
                for managed in bucket.params:
                    self.sharded.local.pop(managed.index, None)
        if self.sharded is not None:
            self.sharded.changed()
        if len(chosen) == len(self._buckets):
            self.is_zeroed = True
            self._left_local = False
        if self.audit is not None:
            self.audit.forget()

    def take_part(self) -> None:
        """Do this rank's part of a backward in which it has no gradients, while other ranks may have some. Collective, as
        every backward is.

        Stage 0: what earlier backward passes of this step have summed is in each rank's `param.grad`, from which each
        contributes its part once more.
        """
        if self.sharded is None and self.join.divisor < self._transport.world_size:
            self._clear_visible()  # those that still train contribute it all
        if self.join.divisor < self._transport.world_size:
            self.untrained.clear(all_of_them=True)
        self._start_backward()
        self._end()
        self._finish_flags()
        if not self._had_gradients:
            self.num_backwards -= 1

    def unscale_along(self, indices: Sequence[int], inverse: float) -> None:
        """Look at gradients, and multiply them, as a GradScaler does on the ranks that still train, when this one has left
        `join()`. Collective.

        Args:
            indices: of the parameters.
            inverse: of the scale.
        """
        assert self.sharded is not None
        self.sharded.check_and_unscale(indices, torch.zeros(()), torch.tensor(inverse))

    def drop_local(self) -> None:
        """Forget what a backward under `no_sync()` has left. Not collective."""
        self.untrained.clear(all_of_them=False)
        if self.has_local_gradients:
            self._clear_visible()
            self._left_local = False

    def _clear_visible(self) -> None:
        """Drop what this rank has in `param.grad` alone: in stages 1 and 2, what is not reduced."""
        for managed in self._params:
            if type(managed.param.grad) is not ShardedGradient:
                managed.param.grad = None
        if self.sharded is not None:
            self.sharded.local.clear()

    def follow_gradients(self, source: int) -> None:
        """Stage 0: take over what a rank has in `param.grad`, where its user may have edited it. Collective."""
        assert self._flags is not None
        broadcaster = Broadcaster(self._transport.group)
        flags = self.take_visible().to(self._flags.device)
        broadcaster.broadcast_flat(flags, source)
        visible = flags.tolist()
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            assert store.full is not None
            broadcaster.broadcast_flat(store.full, source)
            for managed in bucket.params:
                if visible[managed.index]:
                    managed.set_local_grad(store.gradient_of(managed))
                else:
                    managed.param.grad = None

    def take_visible(self) -> Tensor:
        """What `param.grad` says holds, for the user may have cleared, replaced or edited it. After `finish`.

        Returns:
            uint8 [number of parameters], 1 where there is a gradient.
        """
        return self._take_visible_whole() if self.sharded is None else self._take_visible_pieces(self.sharded)

    def _take_visible_pieces(self, sharded: ShardedGradients) -> Tensor:
        flags = bytearray(len(self._params))
        for managed in self._params:
            grad = managed.param.grad
            if sharded.is_shown(managed):
                flags[managed.index] = 1
            elif type(grad) is ShardedGradient:
                raise StateError(
                    f"param.grad of {managed.name!r} was set to the sharded gradient of {grad.param_name!r}; set it to a tensor, "
                    "such as optimizer.full_grad gives"
                )
            elif grad is not None:
                sharded.replace(managed, _dense_gradient(managed))
                sharded.show(managed)  # what is done to it from here on is done to the slices
                flags[managed.index] = 1
            elif sharded.was_cleared(managed):
                sharded.replace(managed, None)
        return torch.frombuffer(flags, dtype=torch.uint8)

    def _take_visible_whole(self) -> Tensor:
        flags = bytearray(len(self._params))
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            for managed in bucket.params:
                grad = managed.local_grad()
                if grad is None:
                    continue
                flags[managed.index] = 1
                store.holds_sum = True
                own = store.gradient_of(managed)
                if grad.data_ptr() != own.data_ptr():
                    managed.set_local_grad(own.copy_(grad))
        return torch.frombuffer(flags, dtype=torch.uint8)

    def check_storage(self) -> None:
        """Raise StateError when a parameter no longer lies in its bucket."""
        for managed, address in zip(self._params, self._addresses, strict=True):
            if managed.data_ptr() != address:
                raise StateError(
                    f"parameter {managed.name!r} no longer lies in zeroopt's storage: the model was moved, cast or "
                    f"given new data after zeroopt.wrap (it is now {managed.param.dtype} on {managed.param.device}). "
                    "Move and cast the model first, then wrap it; to load values use load_state_dict or copy_"
                )

    def take_up_later(self, index: int) -> None:
        """A parameter's gradient has come, but hooks of the user's may change it yet."""
        self._begin_synchronised()
        if self.sync:
            self._later.append(index)
        else:
            self.take_up(index)

    def take_up(self, index: int) -> None:
        """A parameter's gradient is complete in `param.grad`, for this backward."""
        if not self.sync:
            self._left_local = True
            if self.sharded is not None:
                self.sharded.keep_local(index)
            if self.buffer_sync is not None:
                self.buffer_sync.note_local_backward()
            return
        self._begin_synchronised()
        managed, bucket = self._params[index], self._bucket_of[index]
        if not _has_local_gradient(managed):  # a hook of the user's has cleared it
            return
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

    def _begin_synchronised(self) -> None:
        if self.sync and not self._running:
            self._begin()

    def _begin(self) -> None:
        self._start_backward()
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _start_backward(self) -> None:
        self.check_storage()
        while self._in_flight:  # left by the backward before: its buckets are about to be filled again
            self._finish_oldest()
        if self.join.is_on:
            self.join.announce(Phase.BACKWARD)
        self._running = True
        self.is_zeroed = False
        self._scale = 1.0 / self.join.divisor
        self.num_backwards += 1
        self.arrivals.clear()
        self._later.clear()
        if self.sharded is not None:
            self.sharded.checked.clear()
            self._drop_cleared(self.sharded)
        else:
            for managed in self._params:
                if managed.param.grad is None:
                    self._used[managed.index] = 0

    def _drop_cleared(self, sharded: ShardedGradients) -> None:
        """What somebody has cleared since the last backward, by setting `param.grad`, is not to be added to."""
        sharded.changed()
        cleared = {managed.index for managed in self._params if sharded.was_cleared(managed)}
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            gone = [managed for managed in bucket.params if managed.index in cleared]
            if gone and len(gone) == len(bucket.params):
                store.discard()
            for managed in gone:
                if store.holds_sum:
                    sharded.replace(managed, None)
                sharded.forget(managed.index)
                self._used[managed.index] = 0

    def _open(self, bucket: int) -> Tensor | None:
        """The full buffer of a bucket, or None: its gradients then stay where they are until it is the bucket's turn.

        Free buffers are first of all for the buckets that start before it, since it becomes free only after them.
        """
        store = self.stores[bucket]
        if self._pool is None or store.is_open:
            return store.open()
        place = self._place[bucket]
        if place == self._next:
            while self._pool.num_free == 0:
                self._reclaim_oldest()
        else:
            free = self._pool.num_free
            before = (number for number in self._sequence[self._next : place] if not self.stores[number].is_open)
            if len(list(islice(before, free))) == free:
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
        self._note_packed(managed)

    def _pack_together(self, waiting: Sequence[ManagedParam], full: Tensor) -> None:
        """Move gradients into their bucket in one call for each dtype, which is one unless a user has set others."""
        grads = {managed.index: _dense_gradient(managed) for managed in waiting}
        for dtype in {grad.dtype for grad in grads.values()}:
            alike = [managed for managed in waiting if grads[managed.index].dtype is dtype]
            sources = [grads[managed.index] for managed in alike]
            ops.pack_segments(sources, [managed.view_in(full) for managed in alike], scale=self._scale)
        for managed in waiting:
            self._note_packed(managed)

    def _note_packed(self, managed: ManagedParam) -> None:
        # Stages 1 and 2 free it here, which is what keeps full gradients from ever existing side by side.
        if self.sharded is None:
            managed.set_local_grad(self.stores[self._bucket_of[managed.index]].gradient_of(managed))
        else:
            self.sharded.show(managed)
        self._packed[managed.index] = 1

    def _start_complete(self) -> None:
        while self._next < len(self._sequence) and self._missing[self._sequence[self._next]] == 0:
            self._start_next()
        self._transport.progress()

    def _start_next(self) -> None:
        """Let the next bucket travel, once it is full: with what has not been packed so far, and zeros for the rest."""
        number = self._sequence[self._next]
        bucket, store = self._buckets[number], self.stores[number]
        full = self._open(bucket.index)
        assert full is not None
        late = [managed for managed in bucket.params if not self._packed[managed.index]]
        # Those had no buffer when they came, or were left by a backward under no_sync().
        waiting = [managed for managed in late if _has_local_gradient(managed)]
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
        if self._placement.shard_state:
            if self.norm_type is not None:
                note_norm(store, self.norm_type)
        else:  # stage 0: an all-reduce is a reduce-scatter and an all-gather
            assert store.full is not None
            with named_range("all_gather", store.label):
                self._gathers.append((store.label, self._transport.start_all_gather(store.full, label=store.label)))
        if self._pool is not None:
            self._lent.append(store)

    @untraced
    def _end(self) -> None:
        """Autograd calls this when backward is through."""
        for index in self._later:
            self.take_up(index)
        while self._next < len(self._buckets):
            self._start_next()
        with named_range("agree_on_used"):
            self._agree_on_used()
        if self.buffer_sync is not None:
            self.buffer_sync.send(self.join.source)
        edited = next((managed for managed in self._params if self._was_edited(managed)), None)
        everything = all(self._packed)
        self._arrived = bytearray(len(self._params))
        self._packed = bytearray(len(self._params))
        self._missing = [len(bucket.params) for bucket in self._buckets]
        self._next = 0
        self._running = False
        self._left_local = False
        self._transport.progress()
        if self.sharded is None:
            self.finish()
            self._show_gradients()
        elif not everything:  # others may have gradients that this rank has not: all must show the same ones
            self._finish_flags()
            self._show_sharded(self.sharded)
        if self.untrained:
            self.finish()
            self.untrained.average(self._scale)
        if edited is not None:
            _refuse_edit(edited)
        if self.sharded is not None and self.sharded.local:
            added = self._params[next(iter(self.sharded.local))]
            self.sharded.local.clear()
            _refuse_edit(added)

    def _was_edited(self, managed: ManagedParam) -> bool:
        """Stage 0: whether somebody has changed or replaced a gradient after it was taken up."""
        grad = managed.param.grad
        if self.sharded is not None or not self._packed[managed.index] or grad is None:
            return False
        return grad._version > 0

    def _agree_on_used(self) -> None:
        if self._flags_before is not None:
            self._flags_before.finish()
            self._flags_before.wait_until_read()
        assert self._flags is not None
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
                    managed.set_local_grad(store.gradient_of(managed))

    def _show_sharded(self, sharded: ShardedGradients) -> None:
        """Stages 1 and 2: likewise."""
        for managed, used in zip(self._params, self._used.tolist(), strict=True):
            if used and managed.param.grad is None:
                sharded.show(managed)
