"""From autograd to reduced gradients: hooks fill buckets, and full buckets start to travel while backward goes on.

A parameter's hook copies its gradient, divided by the number of ranks, into its bucket and frees it; on a device the gradients of
a bucket wait until the last of them has come, and are copied together. The last one in completes the bucket. Buckets start to travel in an order that all ranks share, whatever the order in which they were completed, so that
all ranks start the same collectives in the same order. When backward ends, what has not arrived on this rank (a parameter that
this rank did not use) counts as zero, and the remaining buckets start.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from ..collectives import Transport
from ..collectives.turnout import Turnout
from ..errors import NotSupportedError, StateError
from ..feature import Features
from ..parameters.buffers import BufferSync
from ..plan.params import ManagedParam
from ..profiling import named_range
from ..storage.bucket import Bucket
from ..storage.buffer_pool import BufferPool
from ..storage.gradient_store import GradientStore
from ..streams import Mark, is_capturing
from ..untraced import is_compiled_backward
from .backward_end import BackwardEnd
from .filling import Filling
from .hooks import GradientHook
from .in_flight import InFlight
from .step_guard import StepGuard
from .untrained import UntrainedGradients
from .used import UsedParams
from .view import GradientView


class GradientReducer:
    """Fills, starts and finishes the gradient buckets of one wrapped model.

    Attributes:
        guard: knows whether a step was broken off.
        view: what `param.grad` shows.
        stores: the gradients of each bucket.
        buffer_sync: sends the model's buffers at the end of each backward; None where they stay as they are.
        untrained: the gradients of the model's other parameters.
        num_backwards: backward passes that have been reduced, but for those in which no rank had a gradient.
        is_zeroed: gradients have been set to zero since the last one.
        num_steps: steps that have been taken.
        num_backwards_stepped: `num_backwards` when the last of them was taken, or left out.
        adds_within: where backward passes run within another, as those of reentrant activation checkpointing do, the gradient of a parameter
            may come in several of them. What comes once more is added to what ranks have summed, as that of a backward of its own.

    Args:
        make_store: makes that of a bucket.
        pool: from which stores borrow full buffers; None where each has its own.
    """

    def __init__(
        self,
        module: nn.Module,
        transport: Transport,
        view: GradientView,
        features: Features,
        turnout: Turnout,
        make_store: Callable[[Bucket], GradientStore],
        pool: BufferPool | None,
        *,
        overlap: bool,
        bucket_buffers: int,
    ) -> None:
        self.guard: StepGuard = StepGuard()
        self.view = view
        self.stores: list[GradientStore] = []
        self.buffer_sync: BufferSync | None = None
        self.untrained: UntrainedGradients = UntrainedGradients(module, transport, self._begin_synchronised)
        self.is_zeroed: bool = False
        self.num_steps: int = 0
        self.num_backwards: int = 0
        self.num_backwards_stepped: int = 0
        self.adds_within = True
        self._transport = transport
        self._make_store = make_store
        self._pool = pool
        self._turnout = turnout
        self._events = features.calls
        self._overlap = overlap
        self._bucket_buffers = bucket_buffers
        self._hooks: list[GradientHook] = []
        self._buckets: list[Bucket] = []
        # Where parameters lie, while `is_ahead`.
        self._left_behind: tuple[list[Bucket], list[GradientStore]] | None = None
        self._filling = Filling(view)
        self.sync = True
        self._in_flight = InFlight(transport, features, pool)
        self._finished: Mark | None = None  # the stream that waited for the last sums
        self._used = UsedParams(transport)
        self._left_local = False  # by a backward under no_sync()
        self._all_cleared = True  # and features have heard of it
        self._first_left = -1  # index of the parameter whose gradient came first in it
        self._running = False  # between the first hook of a backward and its end
        self._is_within = False  # others are known to run within it, whose gradients come one backward after the other
        self._end_awaited: Callable[[], BackwardEnd | None] = lambda: None  # gone where it has raised
        self._is_first = True  # no backward has ended yet
        self._edited: ManagedParam | None = None  # whose gradient was, after it had been taken up
        self._local_end_awaited: BackwardEnd | None = None  # of one under no_sync(), where somebody hears of its end
        self._later: list[int] = []  # of gradients that are taken up when backward is through

    # Parameters and buckets.

    def extend(self, params: Sequence[ManagedParam], buckets: Sequence[Bucket]) -> None:
        """Take up further parameters, in buckets of their own. Collective. Gradients that there are stay."""
        self.finish()
        self._reclaim_all()
        for managed in params:
            managed.align_gradients()
            self._hooks.append(GradientHook(self, self._filling.arrivals, managed.param, managed.index))
        self._used.extend(len(params), buckets[0].device)
        self._add_buckets([*self._filling.params, *params], buckets)

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
        self._used.keep(order, self._buckets[0].device)
        self.view.keep(order)
        self._note_cleared(self._buckets)
        sequence = self._sequence
        self._attach([self._filling.params[old] for old in order])
        self._set_sequence(sequence)

    def rebuild(self, buckets: Sequence[Bucket]) -> None:
        """Go by other buckets in which the same parameters lie. Collective. After `free_buffers`."""
        assert not self._in_flight and not self._running
        self._in_flight.forget_lent()
        self._buckets.clear()
        self._add_buckets(self._filling.params, buckets)

    def lead(self, ahead: Sequence[Bucket]) -> None:
        """Put gradients together in other buckets, which are layouts alone. Collective. Nothing may be on its way; sums that there are
        have to be moved.

        It ends with `rejoin`; with `settle`, when parameters have moved into these buckets; or with `rebuild`.
        """
        assert self._left_behind is None and self._pool is not None
        self._reclaim_all()
        for store in self.stores:
            store.discard()
        self._left_behind = self._buckets, self.stores
        self._pool.fit(ahead)
        self._regroup(list(ahead), list(map(self._make_store, ahead)))

    def rejoin(self) -> None:
        """Put them together where their parameters still lie. Collective, likewise."""
        assert self._left_behind is not None
        self._reclaim_all()
        before, self._left_behind = self._left_behind, None
        self._regroup(*before)

    def settle(self) -> None:
        """Parameters have moved into the buckets of their gradients. Collective. After `free_buffers`."""
        assert self._pool is not None
        self._left_behind = None
        self._pool.fit(self._buckets)
        for store in self.stores:
            store.norm = None  # which was computed without the kernel
        self._attach(self._filling.params)

    def _regroup(self, buckets: list[Bucket], stores: list[GradientStore]) -> None:
        assert not self._in_flight and not self._running
        self._buckets, self.stores = buckets, stores
        for bucket in buckets:
            bucket.place_params()
        self._filling.regroup(buckets)
        self._follow_buckets()

    def _add_buckets(self, params: Sequence[ManagedParam], buckets: Sequence[Bucket]) -> None:
        self._buckets += buckets
        if self._pool is not None:
            self._pool.fit(self._buckets)
        self.stores += map(self._make_store, buckets)
        self._attach(params)

    def _attach(self, params: Sequence[ManagedParam]) -> None:
        """Note where in the buckets each parameter lies."""
        self._filling.attach(params, self._buckets)
        self._follow_buckets()

    def _follow_buckets(self) -> None:
        # Stage 0 has to wait for its reduces in any case, to gather them.
        # Sums on their way from slices to those who step them have memory of their own.
        is_brought = any(bucket.moves is not None for bucket in self._buckets)
        bounded = self._transport.needs_staging or self.stores[0].sum_is_spread or is_brought
        most = max(1, self._bucket_buffers - 1) if bounded else len(self._buckets)
        if self._pool is not None and self._pool.lends_sums:
            most = 1
        self._in_flight.most = most if self._overlap else 0
        self._used.first_bucket = self._buckets[0].name
        self.view.attach(self._filling.params, self._buckets, self.stores)
        self._set_sequence(range(len(self._buckets)))

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

    def free_buffers(self, *, keep_sums: bool) -> None:
        """Give up the memory of gradients, before parameters move.

        Args:
            keep_sums: they are where they will be; before `settle`. Else before `rebuild`.
        """
        self._reclaim_all()
        if self._pool is not None:
            self._pool.free()
        if not keep_sums:
            for store in self.stores:
                store.free(self._transport)
            self.stores.clear()
            self._left_behind = None

    # What there is.

    def count(self) -> tuple[int, int]:
        """How many backward passes and steps there have been."""
        return self.num_backwards, self.num_steps

    @property
    def buckets(self) -> Sequence[Bucket]:
        """In which gradients are put together, with `stores`: where the parameters lie, or, while `is_ahead`, are to lie."""
        return self._buckets

    @property
    def is_ahead(self) -> bool:
        """Whether the buckets of gradients do not hold the parameters yet; they are all buckets of the model then."""
        return self._left_behind is not None

    @property
    def stores_of_params(self) -> list[GradientStore]:
        """The gradients of the buckets in which the parameters lie; while `is_ahead`, there are none in them."""
        return self.stores if self._left_behind is None else self._left_behind[1]

    @property
    def arrivals(self) -> Sequence[int]:
        """Parameters in the order in which the last backward yielded their gradients, by index."""
        return self._filling.arrivals.order

    @property
    def has_local_gradients(self) -> bool:
        """Whether a backward under `no_sync()` has left gradients that no reduce has taken up, and nobody has cleared."""
        if self._left_local and not any(map(self.view.has_local, self._filling.params)):
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
        return self._used.flags

    def check_parameters(self) -> None:
        """Raise StateError when a parameter no longer lies in its bucket, or a step was broken off."""
        self.check_whole()
        self._filling.check_storage()

    def check_whole(self) -> None:
        """Raise StateError when a step was broken off, and tell the other ranks that this one goes no further."""
        if self.guard.is_broken:
            self._transport.give_up("its step was broken off")
        self.guard.check()

    @property
    def sync(self) -> bool:
        """False within `no_sync()`: gradients stay where autograd puts them, in `param.grad`."""
        return self._filling.arrivals.is_on

    @sync.setter
    def sync(self, sync: bool) -> None:
        self._filling.arrivals.is_on = sync

    # Between backward and step.

    def finish(self) -> None:
        """Wait until every gradient that has been produced is reduced. Collective when a backward has run.

        Raises:
            StateError: the last backward raised before it was through.
            CollectiveError: another rank did not do its part.
        """
        self.finish_started()
        while self._used.others_go_on:
            self._follow_others()
            self.finish_started()

    def finish_started(self) -> None:
        """Likewise, of those gradients that this rank has produced: it takes no part in what others go on with. Raises likewise."""
        if self._running:
            self._transport.give_up("its backward raised")
            raise StateError(
                "the last backward did not come to its end, so the ranks no longer agree on what has been reduced; start "
                "the job again from a checkpoint"
            )
        is_first = not self._in_flight.is_finished
        self._in_flight.finish()
        if is_first:
            self._finished = Mark(self._buckets[0].device)
        elif self._finished is not None:  # on another stream, perhaps
            self._finished.wait()
        self._used.finish()

    def take_part(self) -> None:
        """Be through with the last backward on all ranks, before something else is collective. Collective itself, where another rank goes
        on with it: parameters had gradients there in more backward passes within it than here."""
        # On a device the host would wait, and a rank that may be behind has heard at the end.
        if self._buckets[0].device.type == "cpu":
            self._used.finish()
        self._follow_others()

    @torch.no_grad()
    def _follow_others(self) -> None:
        """Have no gradients in what others go on with, until nobody does."""
        while self._used.others_go_on:
            self._start_backward()
            self._end()
            self._used.hear()

    def clear_unused(self, active: Sequence[int]) -> None:
        """Where gradients travel as codes, what had been left out of them travels with no gradient, too: it belongs to no step, and to
        no norm.

        Args:
            active: by index of the parameter, 1 where there is a gradient to step with.
        """
        for bucket, store in zip(self._buckets, self.stores, strict=True):
            for segment in bucket.segments if store.residual is not None else ():
                if not active[segment.owner.index]:
                    store.clear_part(segment)

    def note_step(self) -> None:
        """A step has been taken."""
        self.num_steps += 1
        self.num_backwards_stepped = self.num_backwards

    def note_skipped_step(self) -> None:
        """A GradScaler has left a step out, on all ranks. What codes have left out of its gradients is of a scale that has gone."""
        self.num_backwards_stepped = self.num_backwards
        for store in self.stores:
            if store.residual is not None:
                store.residual.drop()

    def reclaim(self) -> None:
        """After the step: wait for the last messages. Those of gradients hold memory that nothing else frees."""
        if self.buffer_sync is not None:
            self.buffer_sync.wait_for_sent()
        if self._transport.needs_staging:
            self._reclaim_all()

    def _reclaim_all(self) -> None:
        for store in self.stores:
            store.reclaim()
        self._in_flight.forget_lent()

    def discard(self, buckets: Sequence[Bucket] | None = None) -> None:
        """Forget the gradients, reduced and local, of some buckets or of all."""
        self.finish()
        chosen = self._where(buckets)
        for bucket in chosen:
            self.stores[bucket.index].discard()
        self._used.forget([managed.index for bucket in chosen for managed in bucket.params])
        self.view.forget(chosen)
        if buckets is None:
            self._left_local = False
        self._note_cleared(chosen)

    def zero(self, buckets: Sequence[Bucket] | None = None) -> None:
        """Set the reduced gradients of some buckets, or of all, to zero; parameters that had one count as having one still."""
        self.finish()
        chosen = self._where(buckets)
        for bucket in chosen:
            self.stores[bucket.index].zero()
        self.view.zeroed(chosen)
        if len(chosen) == len(self._buckets):
            self.is_zeroed = True
            self._left_local = False
        self._note_cleared(chosen)

    def _where(self, buckets: Sequence[Bucket] | None) -> Sequence[Bucket]:
        """In which buckets the gradients of these are put together now. Only those of all are ever ahead."""
        return self._buckets if buckets is None or self.is_ahead else buckets

    def _note_cleared(self, buckets: Sequence[Bucket]) -> None:
        are_all = len(buckets) == len(self._buckets)
        self._all_cleared |= are_all
        if self._local_end_awaited is not None:  # it has raised
            self._local_end_awaited.forget()
            self._local_end_awaited = None
        for gradients_cleared in self._events["gradients_cleared"]:
            gradients_cleared(None if are_all else buckets)

    def drop_local(self) -> None:
        """Forget what a backward under `no_sync()` has left. Not collective."""
        self.untrained.clear(all_of_them=False)
        if self.has_local_gradients:
            self.view.drop_local()
            self._left_local = False

    # While backward runs.

    def mirror_backward(self) -> None:
        """Do this rank's part of a backward in which it has no gradients, while other ranks may have some. Collective, as
        every backward is.

        Stage 0: what earlier backward passes of this step have summed is in each rank's `param.grad`, from which each
        contributes its part once more, unless those that still train contribute all of it.
        """
        if self._turnout.divisor < self._transport.control.size:
            self.view.stop_contributing()
            self.untrained.clear(all_of_them=True)
        self._start_backward()
        self._end()
        self._used.hear()
        if not self._used.had_gradients:
            self.num_backwards -= 1

    def take_up_later(self, index: int) -> None:
        """A parameter's gradient has come, but hooks of the user's may change it yet."""
        self._begin_synchronised()
        if self.sync:
            self._later.append(index)
        else:
            self.take_up(index)

    def take_up(self, index: int) -> None:
        """A parameter's gradient is complete in `param.grad`, for this backward."""
        if self._accept(index) and self._filling.arrivals.note(index) == 0:
            self.complete(self._filling.arrivals.bucket_of[index])

    def complete(self, bucket: int) -> None:
        """The last gradient of a bucket has come."""
        self._look_within()
        if self._filling.packs_together and self._sequence[self._next] != bucket:
            self._pack_early(bucket)
        self._start_complete()

    def _accept(self, index: int) -> bool:
        """What there is to a gradient that was not just counted; whether it is one for this backward."""
        if not self.sync:
            self._leave_local(index)
            return False
        if not self._running:
            self._begin()
        filling = self._filling
        managed = filling.params[index]
        grad = managed.param.grad
        if grad is None:  # a hook of the user's has cleared it
            return False
        if filling.arrivals.arrived[index]:
            self._check_comes_again(managed)
            self._begin_again(managed)
        else:
            self._look_within()
        bucket = filling.arrivals.bucket_of[index]
        full = None
        if not filling.packs_together:
            store = self.stores[bucket]
            full = store.full if store.is_open else self._open(bucket)
        return filling.leave(managed, grad) if full is None else filling.pack(managed, full)

    def _leave_local(self, index: int) -> None:
        if self._events["local_backward_ended"] and self._local_end_awaited is None:
            self._local_end_awaited = BackwardEnd(self._end_local)
        if not self._left_local:
            self._first_left = index
        self._all_cleared = False
        if index == self._first_left:  # mostly the first one of each backward
            for local_backward_runs in self._events["local_backward_runs"]:
                local_backward_runs()
        self._left_local = True
        self._filling.streams.note_left()
        self.view.keep_local(index)
        if self.buffer_sync is not None:
            self.buffer_sync.note_local_backward()

    def _end_local(self) -> None:
        """A backward under `no_sync()` is through."""
        self._local_end_awaited = None
        for local_backward_ended in self._events["local_backward_ended"]:
            local_backward_ended()

    def _look_within(self) -> None:
        """Where backward passes run within one, autograd would add to what was packed, and others may go on: this rank has to hear of that
        before the user's own next collective, in which it would wait for them, and they for it."""
        end = self._end_awaited()
        if not self._is_within and end is not None and end.runs_within():
            self._note_within()

    def _check_comes_again(self, managed: ManagedParam) -> None:
        """Raise StateError where a gradient has come once more that cannot be added to what came before. In one backward autograd yields
        it once: it is of another one, within this one or around it, or this one has raised."""
        if not self.adds_within or self._end_awaited() is None:
            self._transport.give_up("its backward raised")
            raise StateError(
                f"the gradient of {managed.name!r} arrived twice in one backward; if an earlier backward raised, the "
                "ranks no longer agree on what has been reduced: start the job again from a checkpoint"
            )
        if self.view.is_plain and not self._is_within and self._filling.packed[managed.index]:
            self._transport.give_up("its backward raised")
            raise StateError(
                f"the gradient of {managed.name!r} came once more, and first of all in a backward within this one, such as checkpoints "
                "with use_reentrant=True run: with stage=0 it was on its way already. Wrap with stage 1 or 2, or pass use_reentrant=False"
            )

    def _begin_synchronised(self) -> None:
        if self.sync and not self._running:
            self._begin()

    def _begin(self) -> None:
        if is_compiled_backward():
            raise NotSupportedError(
                "compiled autograd runs this backward, and tells nobody when it is through, which averaging gradients over ranks needs "
                "(DistributedDataParallel refuses it, too): call backward() without it. torch.compile of the model, or of a function "
                "that calls backward(), compiles the backward as well"
            )
        self.take_part()
        self._start_backward()
        self._end_awaited = weakref.ref(BackwardEnd(self._end_all, self._note_within))

    def _note_within(self) -> None:
        """Backward passes run within the one that has begun. What comes next may use the same parameters."""
        self._is_within = True
        self.view.hide(self._filling.packed)

    @torch.no_grad()
    def _begin_again(self, managed: ManagedParam) -> None:
        """The gradient of a parameter has come once more. What came before is summed as that of a backward of its own.

        So it is, with zeros behind it, where autograd has added what comes to a gradient that waits for its bucket: whether one waits depends
        on which parameters a rank uses, and all ranks begin again.
        """
        is_packed = self._filling.packed[managed.index]
        grad = self.view.take_hidden(managed) if is_packed else torch.zeros_like(managed.local)
        self._end(goes_on=True)
        self._start_backward()
        self._note_within()
        if managed.param.grad is None:
            managed.param.grad = grad
        else:
            managed.param.grad.add_(grad)  # as autograd does it

    def _start_backward(self) -> None:
        self.check_parameters()
        # Left by the backward before: its buckets are about to be filled again.
        self._in_flight.finish_sums()
        self._used.forget(self.view.begin_backward())
        # Somebody may have cleared `param.grad` alone, or one optimizer after the other its own.
        if not (self._all_cleared or self._left_local or self.view.holds_sums):
            self._note_cleared(self._buckets)
        self._all_cleared = False
        # Before `divisor` is read: who still trains is heard here.
        for backward_begins in self._events["backward_begins"]:
            backward_begins()
        self._running = True
        self._is_within = False
        self.is_zeroed = False
        self.num_backwards += 1
        self._later.clear()
        self._filling.begin(1.0 / self._turnout.divisor)

    def _full_of(self, bucket: int) -> Tensor | None:
        store = self.stores[bucket]
        return store.full if store.is_open else self._open(bucket)

    def _pack_early(self, bucket: int) -> None:
        """A bucket is complete before its turn: free the memory of its gradients, if there is a buffer for them."""
        full = self._full_of(bucket)
        if full is not None:
            self._filling.streams.join(bucket)
            self._filling.pack_rest(self._buckets[bucket], full)

    def _open(self, bucket: int) -> Tensor | None:
        """The full buffer of a bucket, or None: its gradients then stay where they are until it is the bucket's turn."""
        if self._pool is None:
            return self._open_now(bucket)
        if self.stores[bucket].is_striped:
            return None
        place = self._place[bucket]
        if place == self._next:
            if not self._pool.idle:
                self._in_flight.free_buffer()
        else:
            # Free buffers are first of all for the buckets that start before it. A bucket that took one of theirs would keep it
            # until they are through, and they would wait for it.
            free = len(self._pool.idle)
            before = (number for number in self._sequence[self._next : place] if not self.stores[number].is_open)
            if len(list(islice(before, free))) == free:
                return None
        return self._open_now(bucket)

    def _open_now(self, bucket: int) -> Tensor:
        full = self._in_flight.open(self.stores[bucket])
        self._filling.streams.note_opened(bucket)
        return full

    def _start_complete(self) -> None:
        missing, sequence = self._filling.arrivals.missing, self._sequence
        while self._next < len(sequence) and missing[sequence[self._next]] == 0:
            self._start_next()
        self._transport.progress()

    def _start_next(self) -> None:
        """Let the next bucket travel, once it is full: with what has not been packed so far, and zeros for the rest."""
        number = self._sequence[self._next]
        bucket, store = self._buckets[number], self.stores[number]
        self._filling.streams.join(number)
        if store.is_striped:
            self._start_stripes(bucket, store)
        else:
            full = self._full_of(number)
            assert full is not None
            if self._filling.unpacked[number]:
                self._filling.pack_rest(bucket, full)
            self._start_full(bucket, store, full)
        self._next += 1

    def _start_stripes(self, bucket: Bucket, store: GradientStore) -> None:
        """Let one stripe after the other travel: as many at a time as there are buffers."""
        assert self._pool is not None
        grads = self._filling.take(bucket)
        for stripe in store.stripes:
            if not self._pool.idle:
                self._in_flight.free_buffer()
            full = self._in_flight.open(store)
            with named_range("pack", store.label):
                self._filling.pack_stripe(stripe, bucket, grads, full)
            self._start_full(bucket, store, full)

    def _start_full(self, bucket: Bucket, store: GradientStore, full: Tensor) -> None:
        self._in_flight.make_way()
        for bucket_filled in self._events["bucket_filled"]:
            bucket_filled(bucket, store.stripe, full)
        self._in_flight.start(bucket, store)
        if self._in_flight.most == 0:
            self._in_flight.finish_sums()

    def _end_all(self) -> None:
        """Backward is through, and those around it."""
        hears = self._is_first or self._is_within or self._used.has_run_within
        self._end()
        if hears and not is_capturing(self._buckets[0].device):
            self._used.hear()  # other ranks may have used parameters more often
        self._follow_others()
        self._is_first = False
        edited, self._edited = self._edited, None
        # A mistake of the user's is told at the very end: other ranks wait for this one's part of all that comes before.
        if edited is not None:
            raise StateError(
                f"the gradient of {edited.name!r} was changed while backward ran, after it had been taken up; change gradients "
                "when backward is through, or in a hook on the parameter itself"
            )

    def _end(self, *, goes_on: bool = False) -> None:
        """Gradients have come, once each.

        Args:
            goes_on: with this backward, by `_start_backward`.
        """
        for index in self._later:
            # It has arrived where it came once more, in another backward within this one, with the hook in its new place.
            if not self._filling.arrivals.arrived[index] and self._filling.params[index].param.grad is not None:
                self.take_up(index)
        while self._next < len(self._buckets):
            self._start_next()
        filling, view = self._filling, self.view
        with named_range("agree_on_used"):
            self._used.agree(filling.packed, self.num_steps, runs_within=self._is_within, goes_on=goes_on)
        if self.buffer_sync is not None:
            self.buffer_sync.send(self._turnout.source)
        self._edited = view.take_edited(filling.packed) or self._edited
        everything = all(filling.packed)
        filling.reset()
        self._next = 0
        self._running = False
        self._left_local = False
        self._transport.progress()
        if view.waits or is_capturing(self._buckets[0].device):  # a CUDA graph ends with all that was started in it
            self.finish_started()
        elif not everything:
            self._used.finish()
        # Others may have gradients that this rank has not: all must show the same ones.
        if view.waits or not everything:
            view.show_used(self._used.flags)
        if self.untrained:
            self.finish_started()
            self.untrained.average(filling.scale)
