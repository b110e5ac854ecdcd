"""What `param.grad` shows of the gradients of one wrapped model: the one thing above storage in which the stages differ.

`WholeView` (stage 0): plain tensors, views of the full buffers.
`ShardedView` (stages 1 and 2): objects that stand for the mean over ranks, of which each rank has a slice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from itertools import repeat

import torch
from torch import Tensor

from ..errors import StateError
from ..ops.checks import lies_as
from ..plan.params import ManagedParam
from ..storage.bucket import Bucket
from ..storage.gradient_store import GradientStore
from .exact_norms import NormTerm
from .norm_groups import NormGroups


class GradientView(ABC):
    """Parameters are known by `ManagedParam`s or by their index.

    Attributes:
        is_plain: torch's functions see gradients as plain tensors, and know of no other rank.
        waits: sums lie where `param.grad` points to, so a backward ends when they are there.
        checked: indices of the gradients that a GradScaler has looked at since the last backward, on all ranks together.
    """

    is_plain: bool
    waits: bool

    def __init__(self) -> None:
        self.checked: set[int] = set()
        self._params: Sequence[ManagedParam] = ()
        self._buckets: Sequence[Bucket] = ()
        self._stores: Sequence[GradientStore] = ()

    def attach(
        self, params: Sequence[ManagedParam], buckets: Sequence[Bucket], stores: Sequence[GradientStore]
    ) -> None:
        """Go by these from now on. They hold the same parameters as before, and may hold more."""
        self._params, self._buckets, self._stores = params, buckets, stores

    @abstractmethod
    def keep(self, order: Sequence[int]) -> None:
        """Only the parameters that had these indices are left, in this order. Before `attach`."""

    @abstractmethod
    def moved(self) -> None:
        """The sums lie in other stores."""

    # While backward runs.

    @abstractmethod
    def begin_backward(self) -> Collection[int]:
        """Indices of parameters whose gradient somebody has cleared since the last backward: nothing is added to it."""

    @property
    @abstractmethod
    def holds_sums(self) -> bool:
        """Whether there are sums of earlier backward passes to which the one that has just begun adds. After `begin_backward`."""

    @property
    @abstractmethod
    def shows_sums(self) -> bool:
        """Whether `param.grad` of some parameter shows a sum over ranks."""

    @abstractmethod
    def has_local(self, managed: ManagedParam) -> bool:
        """Whether a parameter has a gradient that no reduce has taken up."""

    @abstractmethod
    def take_local(self, managed: ManagedParam) -> Tensor | None:
        """That gradient, its elements in memory as those of the parameter are; None where there is none. It is no longer kept."""

    @abstractmethod
    def keep_local(self, index: int) -> None:
        """A gradient stays where autograd has put it: backward runs under `no_sync()`."""

    @abstractmethod
    def packed(self, managed: ManagedParam) -> None:
        """A gradient has been moved into its bucket: stop showing what autograd made, which frees it."""

    def packed_bucket(self, bucket: int) -> None:
        """All gradients of a bucket have been, as autograd had left them.

        Args:
            bucket: its index.
        """
        for managed in self._buckets[bucket].params:
            self.packed(managed)

    def hide(self, packed: bytearray) -> None:
        """Until the backward is through, let autograd put what comes once more of a gradient that was packed elsewhere than into its bucket.

        Args:
            packed: as for `take_edited`.
        """

    @abstractmethod
    def take_hidden(self, managed: ManagedParam) -> Tensor:
        """What has come once more, after `hide`. It is no longer kept."""

    @abstractmethod
    def take_edited(self, packed: bytearray) -> ManagedParam | None:
        """A parameter whose gradient was changed or added to after it was packed, if there is one.

        Args:
            packed: [number of parameters], 1 where the gradient of this backward has been packed.
        """

    @abstractmethod
    def show_used(self, used: Tensor) -> None:
        """Show the gradients of parameters that this rank has not used, and others have.

        Args:
            used: uint8 [number of parameters], 1 where any rank had a gradient.
        """

    @abstractmethod
    def drop_local(self) -> None:
        """Forget what no reduce has taken up."""

    @abstractmethod
    def stop_contributing(self) -> None:
        """Those ranks that still train contribute all that earlier backward passes have summed."""

    # Between backward and step. All reduces are finished.

    @abstractmethod
    def take(self) -> Tensor:
        """Let the stores have what `param.grad` says, for the user may have cleared, replaced or edited it.

        Returns:
            uint8 [number of parameters], 1 where there is a gradient.
        """

    @abstractmethod
    def follow(self, source: int) -> None:
        """Take over what a rank has in `param.grad`, where its user may have edited it alone. Collective where `is_plain`."""

    @abstractmethod
    def forget(self, buckets: Sequence[Bucket]) -> None:
        """The gradients of some buckets have been discarded."""

    @abstractmethod
    def zeroed(self, buckets: Sequence[Bucket]) -> None:
        """The sums of some buckets have been set to zero."""

    @abstractmethod
    def changed(self) -> None:
        """Sums have been given a factor."""

    @abstractmethod
    def settle(self, stores: Sequence[GradientStore]) -> None:
        """Let `param.grad` show these gradients as they are, multiplied by their factors."""

    @abstractmethod
    def norm(self, stores: Sequence[GradientStore], active: Tensor, beyond: NormGroups, norm_type: float) -> Tensor:
        """The norm of the gradients in some stores, 0-dim float64, the same on all ranks. Collective, but where `is_plain` and
        no rank holds another part of the model.

        Args:
            active: as `take` gave it.
            beyond: the ranks that hold other parts of the model.
        """

    @abstractmethod
    def norm_terms(self, stores: Sequence[GradientStore], active: Tensor) -> list[NormTerm]:
        """What this rank has of these gradients, for `exact_norm`: all of it where `is_plain`, else its slices. At least one
        term; their factors are one.

        Args:
            active: as `take` gave it.
        """

    @abstractmethod
    def whole(self, managed: ManagedParam) -> Tensor | None:
        """A copy of a gradient that there is, of the parameter's shape and the dtype of the sum. Collective."""

    @abstractmethod
    def as_under_torch(self, params: Sequence[ManagedParam]) -> dict[ManagedParam, Tensor | None]:
        """What `param.grad` of these would be under torch, in memory of its own: the mean, and what `no_sync()` has left on this
        rank. Collective."""


def set_gradients(params: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
    """Set `param.grad` of many parameters, without a step of Python for each."""
    deque(map(setattr, params, repeat("grad"), grads), maxlen=0)


def dense(managed: ManagedParam, grad: Tensor) -> Tensor:
    """A gradient of one rank, its elements in memory as those of the parameter are.

    Raises:
        StateError: it is sparse.
    """
    if grad.layout is not torch.strided:
        raise StateError(
            f"parameter {managed.name!r} has a sparse gradient, which buckets cannot hold; "
            "build its embedding with sparse=False"
        )
    if grad.is_neg():
        grad = grad.resolve_neg()
    if not lies_as(grad, managed.stride):
        grad = torch.empty_like(managed.local, dtype=grad.dtype).copy_(grad)
    return grad
