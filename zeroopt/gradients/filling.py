"""The gradients of one backward on their way from `param.grad` into the full buffers of their buckets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._C import pack as pack_unchecked
from ..errors import StateError
from ..plan.params import ManagedParam
from ..profiling import named_range
from ..storage.bucket import Bucket
from ..storage.stripe import Stripe
from .counting import Arrivals
from .packing_streams import PackingStreams
from .view import GradientView


class Filling:
    """Which gradients have come and which have been packed, by the parameters' indices; how many a bucket lacks, by its index.

    Attributes:
        params: by their index.
        arrivals: which have come.
        packed: 1: it has come, and lies in the bucket; until then in `param.grad`.
        unpacked: of each bucket, how many do not lie in it yet.
        streams: on which they came.
        packs_together: a bucket's gradients stay where they are until the last one has come, and one launch packs them. On the CPU
            each is packed when it comes: a call costs nothing, and it is in the cache.
        scale: what gradients are multiplied by.
    """

    def __init__(self, view: GradientView) -> None:
        self._view = view
        self.arrivals = Arrivals()
        self.arrivals.order = []
        self.streams = PackingStreams(())
        self.scale = 1.0
        self.attach((), ())

    def attach(self, params: Sequence[ManagedParam], buckets: Sequence[Bucket]) -> None:
        """Go by these from now on. No backward may be running."""
        self.params = list(params)
        self._addresses = [0] * len(params)
        for bucket in buckets:
            for managed in bucket.params:
                self._addresses[managed.index] = managed.view_in(bucket.flat_param).data_ptr()
        self._address_of: list[Callable[[], int]] = [managed.address for managed in params]
        self.arrivals.order.clear()
        self.regroup(buckets)

    def regroup(self, buckets: Sequence[Bucket]) -> None:
        """Gradients come together in other buckets from now on; parameters stay where they lie. No backward may be running."""
        bucket_of = [0] * len(self.params)
        for bucket in buckets:
            for managed in bucket.params:
                bucket_of[managed.index] = bucket.index
        self.arrivals.bucket_of = bucket_of
        self._indices = [np.array([managed.index for managed in bucket.params], np.intp) for bucket in buckets]
        self._sizes = list(map(len, self._indices))
        self._leaves = [[managed.param for managed in bucket.params] for bucket in buckets]
        self._tables: dict[int, ops.PackTable] = {}  # of buckets whose gradients have been packed together
        are_left = self.streams.are_left
        self.streams = PackingStreams(buckets)
        self.arrivals.tell = self.streams.tell
        self.packs_together = self.streams.are_there
        self.reset()
        if are_left:
            self.streams.note_left()

    def begin(self, scale: float) -> None:
        """A backward begins."""
        self.scale = scale
        self.arrivals.order.clear()

    def reset(self) -> None:
        """A backward is through."""
        self.packed = bytearray(len(self.params))
        self.unpacked = list(self._sizes)
        self.streams.forget()
        self.arrivals.arrived = bytearray(len(self.params))
        self.arrivals.missing = list(self._sizes)
        self.arrivals.last = self.streams.last

    def check_storage(self) -> None:
        """Raise StateError when a parameter no longer lies in its bucket."""
        if [address() for address in self._address_of] == self._addresses:
            return
        for managed, address in zip(self.params, self._addresses, strict=True):
            if managed.address() != address:
                raise StateError(
                    f"parameter {managed.name!r} no longer lies in zeroopt's storage: the model was moved, cast or "
                    f"given new data after zeroopt.wrap (it is now {managed.param.dtype} on {managed.param.device}). "
                    "Move and cast the model first, then wrap it; to load values use load_state_dict or copy_"
                )

    def pack(self, managed: ManagedParam, full: Tensor) -> bool:
        """Move a gradient of the CPU into its bucket; whether there was one."""
        grad: Tensor | None = managed.param.grad
        if not (
            type(grad) is Tensor
            and type(managed) is ManagedParam
            and grad.layout is torch.strided
            and grad.stride() == managed.stride
            and not grad.is_neg()
        ):  # unlike nearly all gradients, which the view would give as they are
            grad = self._view.take_local(managed)
            if grad is None:
                return False
        # Without the checks of `ops.pack`: this runs between two of autograd's own.
        code = ops.DTYPE_CODES[grad.dtype]
        address = full.data_ptr() + managed.offset * full.element_size()
        numel, threads = managed.numel, torch.get_num_threads()
        pack_unchecked(grad.data_ptr(), code, address, ops.DTYPE_CODES[full.dtype], numel, self.scale, threads)
        self._view.packed(managed)
        self.packed[managed.index] = 1
        self.unpacked[self.arrivals.bucket_of[managed.index]] -= 1
        return True

    def leave(self, managed: ManagedParam, grad: Tensor) -> bool:
        """Let what is in `param.grad` wait there until its bucket has a buffer; whether it is something to wait for."""
        self.streams.note_waiting(self.arrivals.bucket_of[managed.index])
        return type(grad) is Tensor or self._view.has_local(managed)

    def pack_rest(self, bucket: Bucket, full: Tensor) -> None:
        """Move into a bucket what has not been moved when it came, or was left by a backward under `no_sync()`; zeros for the rest."""
        if self.unpacked[bucket.index] == len(bucket.params) and self._pack_all(bucket, full):
            return
        late = [managed for managed in bucket.params if not self.packed[managed.index]]
        waiting = [managed for managed in late if self._view.has_local(managed)]
        if waiting:
            with named_range("pack", bucket.name):
                self._pack_together(waiting, full)
        for managed in late:
            if not self.packed[managed.index]:
                full[managed.offset : managed.offset + managed.numel].zero_()
        self.unpacked[bucket.index] = 0

    def _pack_all(self, bucket: Bucket, full: Tensor) -> bool:
        """Move all gradients of a bucket into it, if each is what nearly all gradients on a device are: as autograd has left it, laid
        out as its parameter. Whether they were."""
        if not self.packs_together:
            return False
        grads: list[Any] = [leaf.grad for leaf in self._leaves[bucket.index]]
        if set(map(type, grads)) != {Tensor}:
            return False
        if bucket.index not in self._tables:
            params = bucket.params
            self._tables[bucket.index] = ops.PackTable(
                [managed.shape for managed in params],
                [managed.stride for managed in params],
                [managed.offset for managed in params],
            )
        with named_range("pack", bucket.name):
            if not self._tables[bucket.index].pack(grads, full, scale=self.scale):
                return False
        if self.arrivals.missing[bucket.index]:  # some have been put there by somebody else
            self.streams.note_read(grads)
        else:
            self.streams.note_all_read(bucket.index, grads)
        self._view.packed_bucket(bucket.index)
        np.frombuffer(self.packed, dtype=np.uint8)[self._indices[bucket.index]] = 1
        self.unpacked[bucket.index] = 0
        return True

    def take(self, bucket: Bucket) -> dict[ManagedParam, Tensor]:
        """Those gradients of a bucket that there are, as they lie in memory, 1-D. They count as packed; none has been before."""
        grads = {managed: self._view.take_local(managed) for managed in bucket.params if self._view.has_local(managed)}
        self._note_packed(grads)
        self.streams.note_read(grad for grad in grads.values() if grad is not None)
        return {managed: managed.flatten(grad) for managed, grad in grads.items() if grad is not None}

    def pack_stripe(self, stripe: Stripe, bucket: Bucket, grads: Mapping[ManagedParam, Tensor], full: Tensor) -> None:
        """Copy what a stripe has of these gradients into its buffer; zeros for the rest."""
        end = 0
        for owner, start, offset, numel in stripe.pieces(bucket.params):
            full[end:offset].zero_()
            end = offset + numel
            if owner in grads:
                ops.pack(grads[owner][start : start + numel], full[offset:end], scale=self.scale)
            else:
                full[offset:end].zero_()
        full[end:].zero_()

    def _pack_together(self, waiting: Sequence[ManagedParam], full: Tensor) -> None:
        """In one call for each dtype, which is one unless a user has set others."""
        taken = {managed.index: self._view.take_local(managed) for managed in waiting}
        grads = {index: grad for index, grad in taken.items() if grad is not None}
        for dtype in {grad.dtype for grad in grads.values()}:
            alike = [managed for managed in waiting if grads[managed.index].dtype is dtype]
            sources = [grads[managed.index] for managed in alike]
            self.streams.note_read(sources)
            ops.pack_segments(sources, [managed.view_in(full) for managed in alike], scale=self.scale)
        self._note_packed(waiting)

    def _note_packed(self, taken: Iterable[ManagedParam]) -> None:
        for managed in taken:
            self._view.packed(managed)
            self.packed[managed.index] = 1
