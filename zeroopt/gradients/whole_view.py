"""Stage 0: `param.grad` is a plain tensor, the parameter's part of its bucket's full buffer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..collectives import Transport
from ..plan.params import ManagedParam
from ..storage.bucket import Bucket
from ..storage.factors import settle_unlike
from ..storage.gradient_store import GradientStore
from .exact_norms import NormTerm
from .norm_groups import NormGroups
from .norms import norm_of_whole
from .view import GradientView, dense


class WholeView(GradientView):
    """Autograd adds to what earlier backward passes have summed, and the next reduce takes all of it along."""

    is_plain = True
    waits = True

    def __init__(self, transport: Transport) -> None:
        super().__init__()
        self._transport = transport
        self._hides = False  # what is packed, until backward is through

    def attach(
        self, params: Sequence[ManagedParam], buckets: Sequence[Bucket], stores: Sequence[GradientStore]
    ) -> None:
        super().attach(params, buckets, stores)
        self._store_of = {
            managed.index: store for bucket, store in zip(buckets, stores, strict=True) for managed in bucket.params
        }
        self._addresses = [self._own(managed).data_ptr() for managed in params]

    def keep(self, order: Sequence[int]) -> None:
        """Nothing is known by index."""

    def moved(self) -> None:
        for managed in self._params:
            grad = managed.local_grad()
            if grad is not None:
                managed.set_local_grad(self._own(managed).copy_(grad))

    def begin_backward(self) -> Collection[int]:
        self._hides = False
        return [managed.index for managed in self._params if managed.param.grad is None]

    @property
    def holds_sums(self) -> bool:
        grads = (managed.local_grad() for managed in self._params)
        return any(
            grad is not None and grad.data_ptr() == address
            for grad, address in zip(grads, self._addresses, strict=True)
        )

    @property
    def shows_sums(self) -> bool:
        return self.holds_sums

    def has_local(self, managed: ManagedParam) -> bool:
        return managed.param.grad is not None

    def take_local(self, managed: ManagedParam) -> Tensor | None:
        grad = managed.local_grad()
        return None if grad is None else dense(managed, grad)

    def keep_local(self, index: int) -> None:
        """Where autograd has put it is `param.grad`."""

    def packed(self, managed: ManagedParam) -> None:
        if self._hides:
            managed.param.grad = None
        else:
            managed.set_local_grad(self._own(managed))

    def packed_bucket(self, bucket: int) -> None:
        for managed in self._buckets[bucket].params:
            self.packed(managed)

    def hide(self, packed: bytearray) -> None:
        self._hides = True
        for managed in self._params:
            if packed[managed.index]:
                managed.param.grad = None

    def take_hidden(self, managed: ManagedParam) -> Tensor:
        grad, managed.param.grad = managed.param.grad, None
        assert grad is not None
        return grad

    def take_edited(self, packed: bytearray) -> ManagedParam | None:
        for managed in self._params:
            grad = managed.param.grad
            if packed[managed.index] and grad is not None and grad._version > 0:
                return managed
        return None

    def show_used(self, used: Tensor) -> None:
        flags = used.tolist()
        for managed in self._params:
            if managed.param.grad is None and flags[managed.index]:
                managed.set_local_grad(self._own(managed))

    def drop_local(self) -> None:
        for managed in self._params:
            managed.param.grad = None

    def stop_contributing(self) -> None:
        self.drop_local()  # what earlier backward passes have summed is among it

    def take(self) -> Tensor:
        flags = bytearray(len(self._params))
        for managed, address in zip(self._params, self._addresses, strict=True):
            grad = managed.local_grad()
            if grad is None:
                continue
            flags[managed.index] = 1
            self._store_of[managed.index].holds_sum = True
            if grad.data_ptr() != address:
                managed.set_local_grad(self._own(managed).copy_(grad))
        return torch.frombuffer(flags, dtype=torch.uint8)

    def follow(self, source: int) -> None:
        control, what = self._transport.control, f"taking over the gradients of rank {source}"
        flags = self.take().to(self._buckets[0].device)
        control.broadcast([flags], source, what)
        visible = flags.tolist()
        for bucket, store in zip(self._buckets, self._stores, strict=True):
            assert store.full is not None
            control.broadcast([store.full], source, what)
            for managed in bucket.params:
                if visible[managed.index]:
                    managed.set_local_grad(store.gradient_of(managed))
                else:
                    managed.param.grad = None

    def forget(self, buckets: Sequence[Bucket]) -> None:
        """Who discards gradients clears `param.grad`."""

    def zeroed(self, buckets: Sequence[Bucket]) -> None:
        """What `param.grad` shows is zero too."""

    def changed(self) -> None:
        """`settle` shows it."""

    def settle(self, stores: Sequence[GradientStore]) -> None:
        for store in stores:
            store.settle()

    def norm(self, stores: Sequence[GradientStore], active: Tensor, beyond: NormGroups, norm_type: float) -> Tensor:
        chosen = set(map(id, stores))
        params = [
            (managed, store)
            for bucket, store in zip(self._buckets, self._stores, strict=True)
            for managed in bucket.params
            if active[managed.index] and id(store) in chosen
        ]
        return norm_of_whole(params, beyond, norm_type)

    def norm_terms(self, stores: Sequence[GradientStore], active: Tensor) -> list[NormTerm]:
        settle_unlike(stores)
        chosen = set(map(id, stores))
        terms = [
            NormTerm(managed.flatten(grad), 1.0 / managed.copies, self._store_of[managed.index].factor)
            for managed in self._params
            if active[managed.index] and id(self._store_of[managed.index]) in chosen
            if (grad := managed.local_grad()) is not None
        ]
        return terms or [NormTerm(stores[0].reduced[:0], 1.0, None)]

    def whole(self, managed: ManagedParam) -> Tensor | None:
        grad = managed.param.grad
        return None if grad is None else grad.clone()

    def as_under_torch(self, params: Sequence[ManagedParam]) -> dict[ManagedParam, Tensor | None]:
        return {managed: self.whole(managed) for managed in params}

    def _own(self, managed: ManagedParam) -> Tensor:
        return self._store_of[managed.index].gradient_of(managed)
