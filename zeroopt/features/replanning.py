"""Buckets in the order in which gradients arrive: planned once more, before the first step, as DistributedDataParallel does.

The first plan takes the parameters in reverse order, which is only a guess at the order in which backward yields their
gradients. Where it was wrong, a bucket waits for a gradient that comes late, and those behind it wait with it. What the
ranks own changes with the plan, so what they have moves: before the first step, when the optimizer has no state yet. What is
moved takes no more than the state that comes then.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence

from .._C import Plan
from ..collectives import Transport
from ..feature import Feature, Step
from ..plan.buckets import agree_on_order, in_order, is_grouped_alike
from ..plan.params import ManagedParam
from ..profiling import named_range
from ..state.inner_state import InnerState
from ..state.layout import ShardLayout
from ..storage.bucket import Bucket
from ..trained import Trained

_log = logging.getLogger("zeroopt")


class Replanning(Feature):
    """Plans the buckets of one optimizer anew, before its first step, and before state is loaded that was saved with another plan.

    Args:
        allowed: whether a step may do so.
    """

    def __init__(self, trained: Trained, *, allowed: bool) -> None:
        self._trained = trained
        self._replica = trained.replica
        self._allowed = allowed
        self.expect_new_order()

    def expect_new_order(self) -> None:
        """Parameters have come or gone: go by the order of their gradients once more."""
        self._is_due = self._allowed
        self._after = self._replica.reducer.num_backwards

    def may_move(self, step: Step) -> None:
        """Before the first step with these parameters: go by the order in which their gradients arrived."""
        if not step.is_done:
            self._follow_arrivals()
            step.stores = self._trained.stores

    def after_step(self, step: Step) -> None:
        """Where backward itself steps, when it has been."""
        if step.is_done:
            self._follow_arrivals()

    def _follow_arrivals(self) -> None:
        reducer = self._replica.reducer
        if not self._is_due or reducer.num_backwards == self._after:
            return
        self._is_due = False
        with named_range("replan"):
            self._trained.finish_reduces()  # what users have made of gradients is to move with them
            order = agree_on_order(reducer.arrivals, self._replica.params, self._replica.transport.control)
            if self._is_alone():
                self._replan(order)
            else:
                reducer.start_in_order(order)

    def follow_order(self, layout: ShardLayout | None) -> None:
        """Plan the buckets as they were when shards were saved, where every rank has its own, which does not fit otherwise.
        Collective.

        Args:
            layout: of what this rank is about to load; None where that is no shard.
        """
        trained = self._trained
        order = [] if layout is None else [list(generation) for generation in layout.order]
        plan: Plan | None = None
        ordered: list[ManagedParam] = []
        if len(order) == 1 and sorted(order[0]) == list(range(len(trained.params))) and self._is_alone():
            ordered = in_order(trained.params, order[0])
            plan = self._replica.make_plan(ordered, trained.config.precision)
        fits_now = layout is None or trained.state_dicts.matches(layout)
        would_fit = layout is not None and plan is not None and trained.state_dicts.would_match(layout, plan, ordered)
        # Of 53 bits, which float64 keeps, those above two say which order it is.
        vote = zlib.crc32(repr(order).encode()) * 4 + 2 * fits_now + would_fit
        everyone = [int(vote) for vote in trained.gather_number(vote, "load_state_dict").tolist()]
        alike = all(one >> 2 == vote >> 2 for one in everyone)
        if alike and all(one & 1 for one in everyone) and not all(one & 2 for one in everyone):
            self._is_due = False
            self._replan(order[0])

    def _is_alone(self) -> bool:
        """Whether all buckets of the model come from one plan, which another one can replace.

        Whole parameters keep their owner: state of any shape would have to move.
        """
        trained = self._trained
        has_whole = any(managed.is_whole for managed in trained.params)
        return len(trained.buckets) == len(self._replica.buckets) and len(trained.generations) == 1 and not has_whole

    def _replan(self, order: Sequence[int]) -> None:
        """Move parameters, gradients and state into buckets for another order. Collective."""
        trained, replica = self._trained, self._replica
        ordered = in_order(trained.params, order)
        plan = replica.make_plan(ordered, trained.config.precision)
        grouped = [{managed.index for managed in bucket.params} for bucket in trained.buckets]
        if is_grouped_alike(grouped, plan, ordered):
            return
        _log_new_plan(trained.buckets, plan, ordered, replica.transport)
        trained.stepper.attach((), ())  # which gives up what it knows of the state, and holds no gradients
        replica.rebuild(plan, ordered, trained.config.precision, InnerState(trained.inner.state))
        trained.buckets[:] = replica.buckets
        trained.stepper.attach(trained.buckets, trained.stores)
        trained.generations = [list(order)]


def _log_new_plan(buckets: Sequence[Bucket], plan: Plan, ordered: Sequence[ManagedParam], transport: Transport) -> None:
    """Say on rank 0, with level DEBUG, what changes."""
    if transport.control.rank == 0:
        first = [ordered[i].name for i in plan.buckets[0].params]
        _log.debug(
            "%d buckets are planned anew, as %d, in the order in which gradients arrive: bucket 0 was of %s … %s, and will be of "
            "%s … %s",
            len(buckets),
            len(plan.buckets),
            *(buckets[0].params[0].name, buckets[0].params[-1].name, first[0], first[-1]),
        )
