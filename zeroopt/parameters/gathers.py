"""Updated parameters on their way from the ranks that stepped them: the step starts one all-gather a bucket and returns."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from threading import RLock

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

from ..collectives import PendingCollective, Transport
from ..collectives.exchange import Chained
from ..collectives.pending import Done
from ..collectives.rounding import RoundingNumbers
from ..profiling import named_range
from ..storage.bucket import Bucket
from ..streams import has_streams, is_capturing
from ..untraced import untraced
from .arriving import (
    Arrival,
    ForwardHook,
    HookPlace,
    arriving_class,
    let_arrive,
    let_be_plain,
    put_on,
    read_only,
    take_off,
)
from .compiled import (
    has_compiled,
    hook_compiled_calls,
    is_below_compiled_call,
    is_scripted,
    unhook_compiled_calls,
    watch_compiler,
)
from .differences import Differences


class ParamGathers:
    """The all-gathers of one wrapped model's parameters.

    Attributes:
        pending: by index of the bucket, those that nobody has waited for.
        are_read_by_graphs: CUDA graphs read parameters, when nobody here can see it: no gather is left to its readers.
        arrived: on a device, those for which some stream has waited, and others may still have to, until the device is through.

    Args:
        lazy: let the first use of a parameter wait for it; else `leave_to_readers` waits for all.
        rounding: of what travels in codes; needed where something does.
    """

    def __init__(
        self, module: nn.Module, transport: Transport, *, lazy: bool, rounding: RoundingNumbers | None = None
    ) -> None:
        self._module = module
        self._transport = transport
        self._differences = Differences(transport, rounding)
        self._lazy = lazy and not is_scripted(module)
        self.pending: dict[int, PendingCollective] = {}
        self.are_read_by_graphs = False
        self.arrived: dict[int, PendingCollective] = {}
        self._hooks: weakref.WeakKeyDictionary[nn.Module, ForwardHook] = weakref.WeakKeyDictionary()
        self._readers: list[list[HookPlace]] = []  # by bucket, of the modules that read it alone
        self._unhooked: set[int] = set()  # buckets whose readers go without their hooks until the next gather
        self._buckets: list[Bucket] = []
        self._halfway: list[Chained] = []  # on their way from those that stepped them to the slices
        self._marked: set[int] = set()  # buckets whose parameters wait when they are used
        self._turn = RLock()  # of threads that wait
        self._is_left = False  # to whoever reads parameters
        self._compiler_was_here = False
        self._compiled_again: set[str] = set()
        self._are_read_unseen = False

    def extend(self, buckets: Sequence[Bucket]) -> None:
        """Take up buckets of further parameters."""
        self.finish_all()
        self.attach([*self._buckets, *buckets])

    def attach(self, buckets: Sequence[Bucket]) -> None:
        """Go by these buckets, in which the same parameters lie, or some of them."""
        assert not self.pending
        self.arrived.clear()
        self._differences.forget()
        self._buckets = list(buckets)
        self._device = buckets[0].device if buckets else torch.device("cpu")
        self._params = [[managed.param for managed in bucket.params] for bucket in buckets]
        self._references = [list(map(TensorWeakRef, params)) for params in self._params]
        self._classes = [arriving_class() for _ in buckets]
        # A user's own class of parameters stays as it is. Methods of a DTensor get at its values past `__torch_function__`.
        self._markable = [all(type(param) is nn.Parameter for param in params) for params in self._params]
        if self._lazy:
            self._hook_modules()

    def _hook_readers(self, bucket: int) -> None:
        """A bucket is on its way: its readers have to wait."""
        if bucket in self._unhooked:
            self._unhooked.remove(bucket)
            put_on(self._readers[bucket])

    def _unhook_readers(self, bucket: int) -> None:
        """It has come, and nobody waits any more: a module with a hook takes torch a microsecond and a half more to call. Code that has
        been compiled may have looked at hooks, so they stay where there is such."""
        if self._lazy and not (self._compiler_was_here or has_compiled()):
            self._unhooked.add(bucket)
            take_off(self._readers[bucket])

    def start(self, bucket: Bucket, readers: PendingCollective) -> None:
        """Start to gather a bucket whose own range has been stepped. Collective, as `Transport.start_all_gather`.

        Args:
            readers: the rendezvous of the ranks that may still read their parameters, of which those of the bucket are about to
                be written; is waited for.
        """
        readers.finish()
        self._expect(bucket, self.gather(bucket))

    def start_written(self, bucket: Bucket) -> None:
        """Likewise for a bucket whose own range has been written by something else, when nobody reads it any more: it travels as it
        is."""
        self._expect(bucket, self._gather_own_ranges(bucket))

    def _expect(self, bucket: Bucket, gather: PendingCollective) -> None:
        self._is_left = False
        self.arrived.pop(bucket.index, None)
        self._hook_readers(bucket.index)
        self.pending[bucket.index] = gather

    def gather(self, bucket: Bucket) -> PendingCollective:
        """What `start` starts."""
        if bucket.precision.parameter_compression is None:
            return self._gather_own_ranges(bucket)
        with named_range("all_gather", bucket.name):
            return self._differences.start(bucket)

    def _gather_own_ranges(self, bucket: Bucket) -> PendingCollective:
        """By way of slices, where own ranges are others."""
        if bucket.moves is None:
            return self._gather_slices(bucket)
        moves, full = bucket.moves, bucket.flat_param
        with named_range("exchange", bucket.name):
            exchange = self._transport.exchange.start(
                full[slice(*moves.own_range)],
                full[slice(*moves.slice_range)],
                moves.from_slices,
                moves.to_owners,
                label=bucket.name,
            )
        # Ranks have owners of other buckets to wait for: none waits before it has stepped all of its own.
        pending = Chained(exchange, partial(self._gather_slices, bucket), is_queued=self._transport.is_queued)
        self._halfway.append(pending)
        return pending

    def _gather_slices(self, bucket: Bucket) -> PendingCollective:
        with named_range("all_gather", bucket.name):
            return self._transport.start_all_gather(bucket.flat_param, label=bucket.name)

    def close(self, bucket: Bucket, until: PendingCollective) -> None:
        """Let whoever uses a parameter of a bucket from now on wait for something else, which comes before its gather."""
        self.finish(bucket.index)
        self._is_left = False
        self.arrived.pop(bucket.index, None)
        self._hook_readers(bucket.index)
        self.pending[bucket.index] = until
        if self._may_mark(bucket.index):
            self._mark(bucket.index)

    def leave_to_readers(self) -> None:
        """All gathers of this step have been started: whoever uses a parameter first waits for it."""
        for pending in self._halfway:
            pending.go_on()
        self._halfway.clear()
        self._transport.flush()
        if self._lazy:
            self._follow_compiler()
        for bucket in list(self.pending):
            if self._lazy and self._may_mark(bucket):
                self._mark(bucket)
            else:
                self.finish(bucket)
        self._is_left = True

    def _follow_compiler(self) -> None:
        """Wait in front of what has been compiled since the last step."""
        watch_compiler(self)
        if self._compiler_was_here:
            self._compiler_was_here = False
            self._hook_modules()

    def compiler_starts(self, function: str, *, again: bool) -> None:
        """Wait for all that is on its way, so that code is made for parameters that have arrived.

        Where nobody has waited in front of that code, it may be a function that reads parameters as a user has passed them. Then their
        class is why it is compiled again, and would be in each step: from the second time on nothing is left to readers.
        """
        self._compiler_was_here = True
        for bucket in list(self._unhooked):  # or the code that is made now would be made again when hooks are back
            self._hook_readers(bucket)
        if not (self._is_left and self.pending):
            return
        if again and not is_below_compiled_call():
            self._are_read_unseen |= function in self._compiled_again
            self._compiled_again.add(function)
        self.finish_all()

    def _may_mark(self, bucket: int) -> bool:
        # A CUDA graph ends with all that was started in it, too.
        read_unseen = self._are_read_unseen or self.are_read_by_graphs or is_capturing(self._device)
        return self._markable[bucket] and not read_unseen

    def _mark(self, bucket: int) -> None:
        """Have the parameters of a bucket wait when they are used."""
        arrival = Arrival(self, bucket, self.pending[bucket], self._references[bucket])
        let_arrive(self._params[bucket], self._classes[bucket], arrival)
        self._marked.add(bucket)

    @untraced
    def finish(self, bucket: int) -> None:
        """Wait until a bucket's parameters are all there: on a device, let the current stream. Any thread may read parameters."""
        with self._turn:
            self._finish(bucket)

    def _finish(self, bucket: int) -> None:
        pending = self.pending.get(bucket)
        if pending is None:
            arrived = self.arrived.get(bucket)
            if arrived is not None and arrived.is_past():
                self.arrived.pop(bucket, None)  # another thread may have been here
                self._unhook_readers(bucket)
            elif arrived is not None:
                arrived.finish()
            return
        with named_range("wait_for_gather", self._buckets[bucket].name):
            pending.finish()
        del self.pending[bucket]
        if has_streams(self._device):
            self.arrived[bucket] = pending
        else:
            self._unhook_readers(bucket)
        if bucket in self._marked:
            self._marked.remove(bucket)
            let_be_plain(self._params[bucket])

    @untraced
    def finish_all(self) -> None:
        """Wait until all parameters are there."""
        for bucket in [*self.pending, *self.arrived]:
            self.finish(bucket)

    def read_only(self) -> AbstractContextManager[None]:
        """Within it, `copy_` into a parameter does nothing: another rank writes the memory that they share."""
        return read_only([param for params in self._params for param in params])

    def _hook_modules(self) -> None:
        """Have forwards, and what has been compiled of them, wait for the parameters that are in buckets now."""
        bucket_of = {
            param: bucket.index for bucket, params in zip(self._buckets, self._params, strict=True) for param in params
        }
        for bucket in list(self._unhooked):
            self._hook_readers(bucket)
        self._readers = [[] for _ in self._buckets]
        for module in self._module.modules():
            below = sorted({bucket_of[param] for param in module.parameters() if param in bucket_of})
            hook = self._hooks.get(module)
            if hook is None:
                if not below:
                    continue
                hook = self._hooks[module] = ForwardHook(weakref.ref(self), module)
            hook.own = sorted({bucket_of[param] for param in module.parameters(recurse=False) if param in bucket_of})
            hook.below = below
            if len(hook.own) == 1 and hook.below == hook.own:
                self._readers[hook.own[0]].append(hook.place)
            hook_compiled_calls(module, hook.finish_below)

    def remove_hooks(self) -> None:
        """Let forwards wait for nothing any more. After `finish_all`."""
        for module, hook in self._hooks.items():
            hook.take_off()
            unhook_compiled_calls(module)


class NoGathers(ParamGathers):
    """Where every rank steps all parameters: stage 0, and a rank alone."""

    def start(self, bucket: Bucket, readers: PendingCollective) -> None:
        """Nothing travels, and nobody's parameters are written."""

    def start_written(self, bucket: Bucket) -> None:
        """Nothing travels."""

    def gather(self, bucket: Bucket) -> PendingCollective:
        """Nothing travels."""
        return Done()
