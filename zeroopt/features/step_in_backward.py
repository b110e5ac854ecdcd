"""Each bucket is stepped as soon as its sum is there, while backward still runs, with `step_in_backward=True`.

No gradients are kept: the sum of a bucket lies in memory that the sum of the next one takes.

    backward    bucket 0 filled ─▶ summed ─▶ own slice stepped ─▶ gather starts
                                      bucket 1 filled ─▶ summed ─▶ own slice stepped ─▶ gather starts
    step()      counts the step, and runs what follows steps: hooks, schedulers, buckets that are planned anew
    forward     whoever reads a parameter first waits for its bucket

The bits are those of the ordinary step. The options that count are those of `param_groups` when backward runs, as `step()` would
have used them; where they are others by then, it raises. (Optimizers in backward: Lv et al., 2023, arXiv:2306.09782.)

**Who may still read.** A sum is there when all ranks have filled the bucket, so no rank needs its parameters for their own
gradients any more, and they may be written, on other ranks and in memory that ranks share, too. Some other operation of the same
backward may yet want them, though its gradient does not go to them. When a bucket is full, this rank raises the versions of its
parameters, at which autograd refuses to use what was saved, and closes it, at which any use in Python is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..collectives import PendingCollective
from ..collectives.pending import Done
from ..errors import NotSupportedError, StateError
from ..feature import Feature, Step
from ..gradients.sharded_view import ShardedView
from ..plan.params import ManagedParam
from ..replica import Replica
from ..stepping.rules import rule_for
from ..storage.bucket import Bucket
from ..storage.gradient_store import GradientStore
from ..storage.stripe import Stripe
from ..trained import Trained
from .used_in_bucket import UsedInBucket

Options = list[dict[str, Any]]


@dataclass
class _Stepped:
    """One optimizer.

    Attributes:
        is_edited: whether its `param_groups` are no longer what is trained.
        check_ready: raises what a step would raise before it changes anything.
        is_due: a backward has stepped its buckets, and its `step()` has yet to be called.
        options: of its groups when that backward began.
    """

    trained: Trained
    is_edited: Callable[[], bool]
    check_ready: Callable[[], None]
    is_due: bool = False
    options: Options = field(default_factory=list)


class StepInBackward(Feature):
    """Steps the buckets of one wrapped model, behind all other features that look at their sums."""

    def __init__(self, replica: Replica) -> None:
        view = replica.reducer.view
        assert isinstance(view, ShardedView)
        self._replica = replica
        self._view = view
        self._optimizers: list[_Stepped] = []
        self._used = UsedInBucket(replica.transport)
        # Of the backward that runs, or was the last.
        self._active = bytearray()  # by index of the parameter
        self._trained_of: dict[int, Trained] = {}  # by index of the bucket
        self._closed: dict[int, _Closed] = {}
        self._num_left = 0  # buckets that have yet to be stepped

    def take_up(self, trained: Trained, is_edited: Callable[[], bool], check_ready: Callable[[], None]) -> None:
        """Step what one more optimizer trains, too."""
        self._optimizers.append(_Stepped(trained, is_edited, check_ready))

    def is_due(self, optimizer: int) -> bool:
        """Whether a backward has stepped the buckets of the optimizer of that number, and its `step()` has yet to be called."""
        return self._optimizers[optimizer].is_due

    def check_not_due(self, what: str) -> None:
        """Raise StateError between a backward and its `step()`."""
        if any(each.is_due for each in self._optimizers):
            raise StateError(
                f"{what} cannot be done between backward and step(), for with step_in_backward=True backward has stepped: do it "
                "after step()"
            )

    def backward_begins(self) -> None:
        """Look at all that may be wrong, before anything is changed.

        Raises:
            StateError: there was a backward before, or gradients are left of it; or as `step`.
        """
        for each in self._optimizers:
            try:
                self._check_may_begin(each)
            except ReferenceError as gone:
                raise StateError(
                    "one of the optimizers that this model was wrapped with is gone, because nothing refers to it any more, and with "
                    "step_in_backward=True backward steps by all of them: keep the wrapped model, or all its optimizers"
                ) from gone
        replica = self._replica
        self._active = bytearray(len(replica.params))
        self._closed.clear()
        self._num_left = len(replica.buckets)
        self._trained_of = {bucket.index: each.trained for each in self._optimizers for bucket in each.trained.buckets}
        self._used.fit(max(len(bucket.params) for bucket in replica.buckets), replica.buckets[0].device)
        for each in self._optimizers:
            each.is_due = True
            each.options = _options_of(each.trained.inner.param_groups)
            each.trained.state_dicts.consolidated = None
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():  # nobody reads what is on its way
                each.trained.follow_writes()

    def _check_may_begin(self, each: _Stepped) -> None:
        if each.is_due:
            raise StateError(
                "a backward has begun before step() was called for the one before, whose gradients were stepped while it ran: "
                "with step_in_backward=True call step() and zero_grad() after each backward. For several backward passes a step "
                "wrap with step_in_backward=False"
            )
        left = next((m for m in each.trained.params if m.index in self._view.stepped and self._view.is_shown(m)), None)
        if left is not None:
            raise StateError(
                f"the gradient of {left.name!r} has not been cleared since the last step, so this backward would add to it, and "
                "with step_in_backward=True it is gone: call zero_grad() between step() and backward"
            )
        if each.is_edited():
            raise StateError(
                "param_groups were edited between forward and backward, which with step_in_backward=True steps by them: edit "
                "them before the forward"
            )
        each.check_ready()

    def bucket_filled(self, bucket: Bucket, stripe: Stripe, full: Tensor) -> None:
        """From now on other ranks may write its parameters. Collective."""
        if not stripe.is_first:
            return
        shown = [self._view.is_shown(managed) for managed in bucket.params]
        for managed, is_shown in zip(bucket.params, shown, strict=True):
            if is_shown:  # of those without a gradient, backward needs none any more
                torch.autograd.graph.increment_version(managed.param)
        closed = self._closed[bucket.index] = _Closed(bucket)
        self._replica.gathers.close(bucket, closed)
        self._used.tell(bytearray(shown), bucket.name)

    @torch.no_grad()
    def bucket_reduced(self, bucket: Bucket, store: GradientStore) -> None:
        """Step it, and start its gather."""
        used = self._used.hear()
        for managed, is_used in zip(bucket.params, used, strict=True):
            self._active[managed.index] = is_used
            if is_used:
                self._note_stepped(managed)
        self._trained_of[bucket.index].stepper.step_bucket(bucket, self._active)
        store.discard()
        closed = self._closed[bucket.index]
        if any(used):
            closed.gather = self._replica.gathers.gather(bucket)
        self._num_left -= 1
        if self._num_left == 0:
            self._end()

    def _note_stepped(self, managed: ManagedParam) -> None:
        if not self._view.is_shown(managed):  # used by other ranks only
            torch.autograd.graph.increment_version(managed.param)
        self._view.stepped.add(managed.index)

    def _end(self) -> None:
        """All buckets are stepped: parameters may be used, by whoever waits for them."""
        active = torch.frombuffer(self._active, dtype=torch.uint8)
        for each in self._optimizers:
            each.trained.state_dicts.note_begun(active)
            with torch._C.DisableTorchFunctionSubclass():
                each.trained.note_versions()
        for closed in self._closed.values():
            closed.backward_is_over = True
        self._replica.gathers.leave_to_readers()

    def before_step(self, step: Step) -> None:
        """Let the step be one that is done already.

        Raises:
            StateError: it would not have been what backward has done, or there was no backward.
            NotSupportedError: a GradScaler calls it.
        """
        each = self._optimizers[step.optimizer]
        if step.found_inf is not None:
            each.trained.config.check_keeps_gradients("a GradScaler")
        active = self._active if each.is_due else bytearray(len(self._replica.params))
        each_was_due, each.is_due = each.is_due, False
        for managed in each.trained.params:
            self._check_left_alone(managed, is_active=bool(active[managed.index]))
        if each_was_due and not _are_alike(each.options, _options_of(step.groups)):
            raise StateError(
                "options of param_groups were changed between backward and step(), and with step_in_backward=True those count "
                "that there are when backward runs: change them before it"
            )
        step.active = torch.frombuffer(active, dtype=torch.uint8)
        step.is_done = True

    def _check_left_alone(self, managed: ManagedParam, *, is_active: bool) -> None:
        view = self._view
        if is_active and not (view.is_shown(managed) and managed.index in view.stepped):
            raise StateError(
                f"the gradient of {managed.name!r} was cleared or replaced between backward and step(), and with "
                "step_in_backward=True backward has stepped by it already"
            )
        if not is_active and (managed.index in view.stepped or view.has_local(managed)):
            raise StateError(
                f"step() was called with a gradient of {managed.name!r} that no backward has left since the last step: with "
                "step_in_backward=True only backward steps. Call zero_grad() after step(), and step() once after each backward"
            )


class _Closed(PendingCollective):
    """What comes before the gather of a bucket: until backward is through, nobody may use its parameters.

    Attributes:
        gather: that has been started.
        backward_is_over: backward is through.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._name = bucket.name
        self.gather: PendingCollective = Done()
        self.backward_is_over = False

    def finish(self) -> None:
        if not self.backward_is_over:
            raise StateError(
                f"a parameter of {self._name} was used while backward runs, after the gradients of that bucket were complete; "
                "with step_in_backward=True it is being stepped by then. Wrap with step_in_backward=False for models or hooks "
                "that do so. If that backward has raised, start the job again from a checkpoint"
            )
        self.gather.finish()

    def is_past(self) -> bool:
        return self.backward_is_over and self.gather.is_past()


def check_steps_by_bucket(optimizer: torch.optim.Optimizer) -> None:
    """Raise NotSupportedError when an optimizer may do something once a step, rather than once a step and parameter."""
    is_torchs = f"{type(optimizer).__module__}.".startswith("torch.optim.")
    if rule_for(optimizer) is None and not is_torchs:
        raise NotSupportedError(
            f"step_in_backward=True steps bucket by bucket, and {type(optimizer).__name__} may count steps or change its groups "
            "in each call: it needs an optimizer of torch.optim or zeroopt.optim, or one with a kernel (register_rule)"
        )


def check_goes_along(features: Sequence[Feature]) -> None:
    """Raise NotSupportedError when a feature takes part in what no longer happens."""
    for feature in features:
        for name in ("before_step", "may_move", "on_gradients", "stepped", "unscaling"):
            if getattr(type(feature), name) is not getattr(Feature, name):
                raise NotSupportedError(
                    f"{type(feature).__name__}.{name}() comes when all gradients are there and nothing is stepped, and with "
                    "step_in_backward=True that is never so: use bucket_filled, bucket_reduced or after_step, or wrap with "
                    "step_in_backward=False"
                )


def _options_of(groups: Sequence[Mapping[str, Any]]) -> Options:
    """The options of an optimizer's groups as they are now."""
    return [
        {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if name not in ("params", "param_names")
        }
        for group in groups
    ]


def _are_alike(before: Options, now: Options) -> bool:
    return len(before) == len(now) and all(
        one.keys() == other.keys() and all(_is_same(one[name], other[name]) for name in one)
        for one, other in zip(before, now, strict=True)
    )


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)
