"""A step of so many backward passes on every rank, whose gradients are summed in one tree over micro-batches and ranks.

So the sum is the same for every way to share the micro-batches of a step among ranks. See `gradients.tree_sum` for the tree, and
docs/reproducibility.md for what it takes besides.

    backward under no_sync()   autograd adds every second micro-batch to the one before, in `param.grad`, which is the lowest level of the
                               tree; pairs go to a `TreeSum`. Gradients of 16 bits, which autograd would round, all go there, as float32
    the last backward          fills buckets with the gradients of the last pair, and to a full bucket the sums of the others are added,
                               the last ones first; then it travels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..collectives import Transport
from ..collectives.turnout import Turnout
from ..errors import ConfigError, NotSupportedError, StateError
from ..feature import Feature, Step
from ..gradients.reducer import GradientReducer
from ..gradients.tree_sum import TreeSum
from ..plan.params import ManagedParam
from ..storage.bucket import Bucket
from ..storage.stripe import Stripe
from ..streams import note_use


class MicroBatches(Feature):
    """Sums the gradients of a step's micro-batches on this rank.

    Args:
        count: of backward passes of a step, a power of two.
        params: of the model, by their index.
        turnout: by whose divisor gradients are divided on their way into buckets.
    """

    def __init__(
        self,
        count: int,
        params: Sequence[ManagedParam],
        reducer: GradientReducer,
        transport: Transport,
        turnout: Turnout,
    ) -> None:
        self._count = count
        reducer.adds_within = False  # in an order that is not the tree's
        self._params = params
        self._reducer = reducer
        self._transport = transport
        self._turnout = turnout
        self._num_local = 0  # backward passes of this step so far that were left on this rank
        self._pairs = TreeSum()  # of pairs of micro-batches that autograd has added
        self._singles = TreeSum()  # of parameters of 16 bits

    def local_backward_ended(self) -> None:
        self._check_cleared()
        if self._num_local == 0:
            self._forget_all()
        self._num_local += 1
        if self._num_local >= self._count:
            raise self._refusal(f"{self._num_local} of them under no_sync()")
        self._singles.add({m.index: self._take(m).float() for m in self._with_gradient() if _is_short(m)})
        if self._num_local % 2 == 0:
            self._pairs.add({m.index: self._take(m) for m in self._with_gradient() if not _is_short(m)})
        if self._num_local == self._count - 1:
            self._show_all_used()

    def backward_begins(self) -> None:
        self._check_cleared()
        # A rank that has run none takes part in that of the others, with zeros.
        if self._num_local != self._count - 1 and (self._num_local or self._with_gradient()):
            raise self._refusal(f"{self._num_local} of them under no_sync() before one outside of it")
        self._num_local = 0

    def bucket_filled(self, bucket: Bucket, stripe: Stripe, full: Tensor) -> None:
        scale = 1.0 / self._turnout.divisor  # a power of two, so that it does not matter what is multiplied by it
        for tree in (self._singles, self._pairs):
            for sums in tree.sums():
                _add_to(full, sums, stripe, bucket, scale)
        if stripe.end == stripe.slice_numel:  # the last one
            self._forget(bucket)

    def gradients_cleared(self, buckets: Sequence[Bucket] | None) -> None:
        if buckets is None:
            self._num_local = 0
            self._forget_all()
            return
        for bucket in buckets:
            self._forget(bucket)
        cleared = {managed.index for bucket in buckets for managed in bucket.params}  # whose `param.grad` goes next
        left = {managed.index for managed in self._with_gradient()} | self._singles.numbers() | self._pairs.numbers()
        if left <= cleared:  # the last of several optimizers has cleared its own
            self._num_local = 0

    def before_step(self, step: Step) -> None:
        if self._num_local:
            raise self._refusal(f"{self._num_local} of them under no_sync() before step()")

    def _forget(self, bucket: Bucket) -> None:
        numbers = [managed.index for managed in bucket.params]
        self._singles.drop(numbers)
        self._pairs.drop(numbers)

    def _forget_all(self) -> None:
        self._singles.clear()
        self._pairs.clear()

    def _with_gradient(self) -> list[ManagedParam]:
        return [managed for managed in self._params if managed.param.grad is not None]

    def _take(self, managed: ManagedParam) -> Tensor:
        """What autograd has left, which `param.grad` no longer shows."""
        grad = self._reducer.view.take_local(managed)
        assert grad is not None
        managed.param.grad = None
        return grad

    def _show_all_used(self) -> None:
        """Before the last backward: parameters that it may not use, but others have, have a gradient of zero in it."""
        for index in self._singles.numbers() | self._pairs.numbers():
            if self._params[index].param.grad is None:
                self._params[index].set_local_grad(torch.zeros_like(self._params[index].local))

    def _check_cleared(self) -> None:
        """Raise StateError when there are sums of the step before, to which gradients would be added outside of the tree."""
        if self._num_local == 0 and self._reducer.view.shows_sums:
            raise self._give_up(
                f"with micro_batches={self._count}, a step is the sum of its own backward passes alone, and there are gradients of an "
                "earlier one: clear them by optimizer.zero_grad(set_to_none=True) after each step"
            )

    def _refusal(self, what: str) -> StateError:
        return self._give_up(
            f"with micro_batches={self._count}, a step is {self._count - 1} backward passes under no_sync() and one outside of it, on "
            f"every rank, got {what}; zero_grad() begins a step anew"
        )

    def _give_up(self, message: str) -> StateError:
        """Other ranks may be at another place, and wait for this one."""
        self._transport.give_up("its micro-batches are not those of a step")
        return StateError(message)


def _add_to(full: Tensor, sums: Mapping[int, Tensor], stripe: Stripe, bucket: Bucket, scale: float) -> None:
    """Add sums, multiplied, to what a buffer has of their parameters."""
    parts, terms = [], []
    for owner, start, offset, numel in stripe.pieces(bucket.params):
        if owner.index in sums:
            parts.append(full[offset : offset + numel])
            terms.append(owner.flatten(sums[owner.index])[start : start + numel])
    if parts:
        torch._foreach_add_(parts, terms, alpha=scale)
    for term in terms:  # of which autograd may have made the first on another stream
        note_use(term)


def _is_short(managed: ManagedParam) -> bool:
    return managed.param.dtype.itemsize == 2


def check_number_of_ranks(size: int) -> None:
    """Raise ConfigError when gradients cannot be divided by the number of ranks without being rounded."""
    if size & (size - 1):
        raise ConfigError(
            f"micro_batches needs 1, 2, 4 or another power of two ranks, by which gradients are divided exactly, got {size}"
        )


def check_sums_in_tree(transport: Transport) -> None:
    """Raise NotSupportedError when a transport adds up what ranks have in another order. On all ranks alike."""
    if not transport.sums_in_tree:
        raise NotSupportedError(
            f"micro_batches needs sums in one tree over ranks, and transport {transport.name!r} adds up in another order here: the "
            "backend's own collectives do, and so do hosts or shard groups whose ranks do not follow one another; on one host of GPUs "
            "pass transport='all_to_all'"
        )
