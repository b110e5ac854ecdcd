"""What a user may switch on takes part in a backward and a step by these calls, and the core knows no more of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .storage.bucket import Bucket
from .storage.gradient_store import GradientStore
from .storage.stripe import Stripe
from .weak_methods import weak_call

__all__ = ["Bucket", "Feature", "GradientStore", "Step", "Stripe"]


@dataclass
class Step:
    """A step of one optimizer of a wrapped model, as features see it.

    Attributes:
        optimizer: its number among the optimizers of the model.
        number: of the step, counted from 1 over all of them.
        groups: its param_groups.
        buckets: that it steps.
        stores: their gradients.
        found_inf: where a GradScaler calls `step` whatever it has found: not 0 when a gradient is not finite, on which all ranks
            have agreed. As for the fused optimizers of torch.
        grad_scale: where it leaves it to the step to divide gradients by it.
        active: uint8 [number of parameters of the model], 1 where there is a gradient to step with; from `on_gradients` on.
        is_skipped: nothing is stepped; set in `on_gradients`, on all ranks alike.
        changes_all: parameters change that have no gradient, too; set in `on_gradients`.
        is_done: its buckets were stepped while backward ran; set in `before_step`, and `active` with it. `on_gradients` and
            `stepped` are not called then.
    """

    optimizer: int
    number: int
    groups: Sequence[dict[str, Any]]
    buckets: Sequence[Bucket]
    stores: Sequence[GradientStore]
    finish_reduces: Callable[[], Tensor]
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
    active: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.uint8, device="cpu"))
    is_skipped: bool = False
    changes_all: bool = False
    is_done: bool = False

    def sum_gradients(self) -> Tensor:
        """Have all gradients summed, and see what `param.grad` says; returns `active`. Collective."""
        self.active = self.finish_reduces()
        return self.active


class Feature:
    """Something that takes part in training. Each call does nothing unless it is overridden.

    All ranks have the same features in the same order, so those calls that are marked as collective may communicate. None comes
    once a parameter: the hook of a parameter stays as short as it is.
    """

    def backward_begins(self) -> None:
        """A synchronised backward begins on this rank. Collective."""

    def bucket_filled(self, bucket: Bucket, stripe: Stripe, full: Tensor) -> None:
        """A bucket has all its gradients of this rank, and is about to travel, or a stripe of it is, in an order that is the same on all
        ranks. Collective.

        Args:
            stripe: says what of the bucket lies where in `full`.
            full: [stripe.numel], divided by the number of ranks already.
        """

    def bucket_reduced(self, bucket: Bucket, store: GradientStore) -> None:
        """A bucket's sum over ranks is there, in the order in which buckets travel, the same on all ranks. Collective.

        When it comes depends on numbers of buckets alone, never on how far other ranks are.

        Args:
            store: in stages 1 and 2, `store.reduced` [own range] is this rank's slice of the sum, float32 or as the parameters,
                to be read or changed in place. In stage 0 it is the whole bucket, of which only this rank's slice is summed
                yet; the others follow.
        """

    def unscaling(self, indices: Sequence[int], inverse: float) -> None:
        """A GradScaler looks at gradients of stages 1 and 2, and multiplies them. Collective.

        Args:
            indices: of the parameters.
            inverse: of the scale.
        """

    def local_backward_runs(self) -> None:
        """A backward under `no_sync()` leaves gradients on this rank. Not collective."""

    def local_backward_ended(self) -> None:
        """A backward under `no_sync()` is through. Not collective."""

    def gradients_cleared(self, buckets: Sequence[Bucket] | None) -> None:
        """Gradients were set to None or to zero. Not collective.

        Args:
            buckets: theirs; None: all of the model.
        """

    def before_step(self, step: Step) -> None:
        """A step begins; nothing has been changed, and what raises on all ranks leaves it so. Collective."""

    def may_move(self, step: Step) -> None:
        """Nobody has refused the step: what lies where may change now, values may not. Collective."""

    def on_gradients(self, step: Step) -> None:
        """All gradients of the step are summed. Collective."""

    def stepped(self, step: Step, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        """Pass buckets on when they may be gathered, in the order in which they come. Collective.

        Args:
            buckets: yields each bucket when this rank has stepped its own range. Those behind it have yet to be stepped.
        """
        return buckets

    def after_step(self, step: Step) -> None:
        """Parameters are on their way. Collective."""


_EVENTS = [name for name, value in vars(Feature).items() if not name.startswith("_") and callable(value)]


class Features:
    """The features that are on, in a fixed order. Whoever calls them goes through those alone that override the call.

        for look in features.calls["bucket_filled"]:
            look(bucket, stripe, full)

    Attributes:
        calls: by the name of a call, the methods of the features that are on and override it. They keep no feature alive: features work
            on what calls them.
    """

    def __init__(self) -> None:
        self._known: list[Feature] = []
        self._on: set[Feature] = set()
        self.calls: dict[str, list[Callable[..., Any]]] = {name: [] for name in _EVENTS}

    def add(self, feature: Feature, *, on: bool = True) -> None:
        """Take a feature up, behind the others. All ranks have to take up the same ones in the same order."""
        self._known.append(feature)
        self.switch(feature, on=on)

    def switch(self, feature: Feature, *, on: bool) -> None:
        """Have a feature that was taken up called from now on, or no longer; it may be so already. On all ranks at the same
        place, and never from within the call that it is to hear next, or no longer."""
        if on is (feature in self._on):
            return
        if on:
            self._on.add(feature)
        else:
            self._on.discard(feature)
        for name, methods in self.calls.items():
            # In place: whoever calls them keeps the list.
            methods[:] = [weak_call(each, name) for each in self.called(name)]

    def called(self, name: str) -> list[Feature]:
        """Those that are on and override a call."""
        return [
            each for each in self._known if each in self._on and getattr(type(each), name) is not getattr(Feature, name)
        ]
