"""Buckets in the order in which gradients arrive: planned once more, before the first step, as DistributedDataParallel does.

The first plan takes the parameters in reverse order, which is only a guess at the order in which backward yields their
gradients. Where it was wrong, a bucket waits for a gradient that comes late, and those behind it wait with it. What the
ranks own changes with the plan, so what they have moves: before the first step, when the optimizer has no state yet. What is
moved takes no more than the state that comes then.

    first forward     `Foresight` sees in which order modules are used
    first backward    in stage 2, gradients go into buckets that are planned by it, which are layouts alone: graphs that were
                      recorded refer to the parameters where they are
    first step        parameters move there, or, where gradients arrived in yet another order, all moves by that

Where a CUDA graph of the model has been captured before, parameters stay where they are, for it replays their addresses.
"""

from __future__ import annotations

import logging
import weakref
import zlib
from collections.abc import Sequence
from functools import partial

from .._C import Plan
from ..collectives import Transport
from ..feature import Feature, Step
from ..plan.buckets import agree_on_order, in_order, is_grouped_alike, most_incomplete
from ..plan.params import ManagedParam
from ..profiling import named_range
from ..state.inner_state import InnerState
from ..state.layout import ShardLayout
from ..storage.bucket import Bucket
from ..storage.buffer_pool import num_buffers
from ..trained import Trained
from .captures import Captures
from .foresight import Foresight

_log = logging.getLogger("zeroopt")


class Replanning(Feature):
    """Plans the buckets of one optimizer anew, before its first step, and before state is loaded that was saved with another plan.

    Args:
        foresight: tells in which order gradients will come; None where nothing does.
        captures: sees CUDA graphs; None where there are none.
        allowed: whether a step may do so.
    """

    def __init__(
        self, trained: Trained, foresight: Foresight | None, captures: Captures | None = None, *, allowed: bool
    ) -> None:
        self._trained = trained
        self._replica = trained.replica
        self._foresight = foresight if allowed else None
        self._captures = captures
        self._allowed = allowed
        self._led: Sequence[int] = ()  # by which the gradients that are ahead of their parameters were planned
        self.expect_new_order()

    def expect_new_order(self) -> None:
        """Parameters have come or gone: go by the order of their gradients once more."""
        self._is_due = self._allowed
        self._after = self._replica.reducer.num_backwards
        if self._foresight is not None:
            self._foresight.watch(self._replica.params, partial(_lead, weakref.ref(self)))

    def lead(self, order: Sequence[int]) -> None:
        """The first backward begins: let gradients go by the order in which they are expected. Collective."""
        if self._is_due and self._is_alone() and not self._makes(order, self._trained.buckets):
            self._replica.lead_gradients(self._lay_out(order))
            self._led = order

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
            self._trained.sum_gradients()  # what users have made of gradients is to move with them
            order = agree_on_order(reducer.arrivals, self._replica.params, self._replica.transport.control)
            if self._is_alone() and not self._is_captured():
                self._replan(self._led if self._is_foreseen(order) else order)
            else:
                self._replica.rejoin_gradients()
                reducer.start_in_order(order)

    def _is_captured(self) -> bool:
        """Whether a CUDA graph replays addresses of parameters, on any rank. Collective."""
        if self._captures is None:
            return False
        label = "captured CUDA graphs"
        is_captured = bool(self._trained.gather_number(float(self._captures.exist), label).any())
        if is_captured and self._replica.transport.control.rank == 0:
            _log.warning(
                "a CUDA graph was captured before the first step, so buckets stay as they are, and are not planned anew in the order "
                "in which gradients arrive: a backward may have to wait for more of them. Capture after two steps instead"
            )
        return is_captured

    def _is_foreseen(self, order: Sequence[int]) -> bool:
        """Whether no gradient waits for memory in the buckets that were planned by what the first forward told, when gradients come
        in this order."""
        reducer = self._replica.reducer
        return reducer.is_ahead and most_incomplete(_groups_of(reducer.buckets), order) <= num_buffers(
            self._trained.config
        )

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
        is_captured = self._captures is not None and self._captures.exist
        may_move = self._is_alone() and not is_captured
        if len(order) == 1 and sorted(order[0]) == list(range(len(trained.params))) and may_move:
            plan, ordered = self._plan(order[0])
        fits_now = layout is None or trained.state_dicts.matches(layout)
        would_fit = layout is not None and plan is not None and trained.state_dicts.would_match(layout, plan, ordered)
        # Of 53 bits, which float64 keeps, those above two say which order it is.
        vote = zlib.crc32(repr(order).encode()) * 4 + 2 * fits_now + would_fit
        everyone = [int(vote) for vote in trained.gather_number(vote, "load_state_dict").tolist()]
        alike = all(one >> 2 == vote >> 2 for one in everyone)
        if alike and all(one & 1 for one in everyone) and not all(one & 2 for one in everyone):
            self._is_due = False
            self._replan(order[0])

    def plan_by(self, order: Sequence[Sequence[int]]) -> None:
        """Plan the buckets by an order, for good, if that can be done on all ranks. Collective.

        Args:
            order: numbers of the parameters as they were planned, for each time that some were taken in; the same on all ranks.
        """
        trained = self._trained
        is_captured = self._captures is not None and self._captures.exist
        is_whole = len(order) == 1 and sorted(order[0]) == list(range(len(trained.params)))
        can = is_whole and self._is_alone() and not is_captured
        if bool(trained.gather_number(float(can), "buckets as they were").all()):
            self._is_due = False
            self._replica.rejoin_gradients()
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
        if self._makes(order, trained.buckets):
            return
        is_led = replica.reducer.is_ahead and order == self._led
        buckets = replica.reducer.buckets if is_led else self._lay_out(order)
        _log_new_plan(trained.buckets, buckets, replica.transport)
        trained.stepper.attach((), ())  # which gives up what it knows of the state, and holds no gradients
        replica.rebuild(buckets, InnerState(trained.inner.state))
        trained.buckets[:] = replica.buckets
        trained.stepper.attach(trained.buckets, trained.stores)
        trained.generations = [list(order)]

    def _plan(self, order: Sequence[int]) -> tuple[Plan, list[ManagedParam]]:
        """A plan for an order, and the parameters as it takes them."""
        ordered = in_order(self._trained.params, order)
        return self._replica.make_plan(ordered, self._trained.config.precision), ordered

    def _makes(self, order: Sequence[int], buckets: Sequence[Bucket]) -> bool:
        """Whether a plan for an order groups parameters as these buckets do."""
        return is_grouped_alike(_groups_of(buckets), *self._plan(order))

    def _lay_out(self, order: Sequence[int]) -> list[Bucket]:
        return self._replica.lay_out(*self._plan(order), self._trained.config.precision)


def _lead(replanning: weakref.ref[Replanning], order: Sequence[int]) -> None:
    """Collective. Where its optimizer has been dropped, there is another one, or nobody would hear of a backward: a model of several
    optimizers leaves its buckets as they are."""
    there = replanning()
    if there is not None:
        there.lead(order)


def _groups_of(buckets: Sequence[Bucket]) -> list[set[int]]:
    return [{managed.index for managed in bucket.params} for bucket in buckets]


def _log_new_plan(before: Sequence[Bucket], after: Sequence[Bucket], transport: Transport) -> None:
    """Say on rank 0, with level DEBUG, what changes."""
    if transport.control.rank == 0:
        # Of those that parameters have left, some are empty.
        was, is_to_be = (next(b.params for b in buckets if b.params) for buckets in (before, after))
        _log.debug(
            "%d buckets are planned anew, as %d, in the order in which gradients arrive: the first was of %s … %s, and will be of "
            "%s … %s",
            len(before),
            len(after),
            *(was[0].name, was[-1].name, is_to_be[0].name, is_to_be[-1].name),
        )
