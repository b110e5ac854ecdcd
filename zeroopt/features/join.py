"""Ranks that run out of data at different times: who has left its loop mirrors what the others do.

    rank 0    backward   step   backward   step   backward   step   leaves
    rank 1    backward   step   leaves     ────── mirrors ──────────────▶

While a `join()` context is open, every rank announces what it is about to do before it starts its collectives: one number
of each rank goes round. A rank that has left announces just that, learns from the others' numbers what they are at, and
makes the same call with the same arguments, without data of its own. That goes on until all have left.

To let another collective call take part: give it a `Phase`, announce it before its first collective, and name the call that
mirrors it in `ZeroDataParallel.join`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..collectives import Transport
from ..collectives.turnout import Turnout
from ..errors import CollectiveError, RankMismatchError, StateError
from ..feature import Feature, Step
from ..gradients.view import GradientView
from ..state.entries import on_cpu, sequence_like

_WHAT = "what ranks in join() do next"  # for messages


class Phase(IntEnum):
    """What a rank is about to do."""

    LEAVE = 0
    FORWARD = 1
    BACKWARD = 2
    CLIP = 3
    STEP = 4
    ZERO_GRAD = 5
    UNSCALE = 6
    OVERFLOW = 7

    def __str__(self) -> str:
        return self.name.lower()


JoinCalls = Mapping[Phase, Callable[..., object]]
"""What a rank that has left calls for each phase of the others; for LEAVE, what all do when the last one has left."""


class Join:
    """What the ranks of one wrapped model tell each other within `join()`. Outside of it, it is idle.

    Attributes:
        is_on: this rank is within the context.
        throws: all ranks stop when the first one leaves.
        some_have_left: as of the last announcement.

    Args:
        turnout: is told how many ranks still train; when all have left, its `source` is the first of those that were last to.
    """

    # Ranks that have left one context would not hear those that are still in another.
    _open: ClassVar[Join | None] = None

    def __init__(self, transport: Transport, turnout: Turnout) -> None:
        self._transport = transport
        self._turnout = turnout
        self._reset()

    def _reset(self) -> None:
        self.is_on = False
        self.throws = False
        self._turnout.divisor = self._transport.control.size
        self._turnout.source = 0
        self.some_have_left = False
        self._divides_by_all = True
        self._has_left = False
        self._notes: list[tuple[Phase, tuple[Any, ...]]] = []
        self._failure: Exception | None = None
        self._calls: JoinCalls = {}
        self._drain: Callable[[], None] = _do_nothing
        self._leave: Callable[[], None] = _do_nothing
        self._has_mirrored = False

    @contextmanager
    def context(
        self,
        calls: JoinCalls,
        *,
        drain: Callable[[], None],
        leave: Callable[[], None],
        switched: Callable[[], None],
        divide_by_initial_world_size: bool,
        enable: bool,
        throw_on_early_termination: bool,
    ) -> Iterator[None]:
        """Within it, ranks announce what they do; at its end, this rank mirrors the others until all have left.

        Collective at both ends. An exception that leaves it goes through at once: to the other ranks, this one has failed.

        Args:
            drain: finishes all reduces that have been started. Ranks that wait for each other in an announcement and in a
                reduce would wait for ever.
            leave: called once by a rank that has left, before its first call for the others.
            switched: called when announcements begin, and when they have ended.

        Raises:
            StateError: a context is open already, or on all ranks when `throw_on_early_termination` and one has left.
            RankMismatchError: on all ranks, which have passed different arguments.
            CollectiveError: on all ranks, which are about to do different things.
        """
        self.check_outside("join()")
        if Join._open is not None:
            raise StateError(
                "join() of another model is open on this rank. Ranks that have left the inner context could not answer those "
                "still in the outer one: use one after the other, or give all ranks the same number of batches"
            )
        drain()
        self._agree_on_arguments(
            divide_by_initial_world_size=divide_by_initial_world_size,
            enable=enable,
            throw_on_early_termination=throw_on_early_termination,
        )
        if not enable:
            yield
            return
        Join._open = self
        self.is_on, self.throws = True, throw_on_early_termination
        self._divides_by_all = divide_by_initial_world_size
        self._calls, self._drain, self._leave = calls, drain, leave
        switched()
        try:
            yield
            self._mirror_others()
        finally:
            Join._open = None
            self._reset()
            switched()

    def announce(self, phase: Phase, *args: Any) -> None:
        """Tell that this rank is about to make a call, and hear what the others are about to do. Only while `is_on`.

        Collective among the ranks that still train, and those that have left take part: call it where, and only where, all
        ranks start the same collectives. Where this rank has left itself and mirrors the call, it does nothing.

        Args:
            args: what a rank that has left has to know to make the same call; has to be picklable. Those of `source` count.

        Raises:
            StateError: a rank has left and `throws` is set. Nothing of the call has been done.
            CollectiveError: ranks are about to do different things.
        """
        if self._has_left:
            return
        self._look_around(self._exchange(phase))
        if self.some_have_left:
            self._share_and_catch_up(args)
        self._notes.clear()

    def note(self, phase: Phase, *args: Any) -> None:
        """Remember a call that is not collective, for ranks that have left to make before the next one that is announced.

        They may have made it already, as the last thing before they left: it has to be harmless twice.
        """
        if not self._has_left:
            self._notes.append((phase, args))

    def check_outside(self, what: str) -> None:
        """Raise StateError within the context."""
        if self.is_on:
            raise StateError(
                f"{what} cannot be called within join(): ranks that have run out of data would not take part; call it before "
                "or after the context"
            )

    @torch.no_grad()
    def _mirror_others(self) -> None:
        self._has_left = True
        while (phase := self._look_around(self._exchange(Phase.LEAVE))) is not Phase.LEAVE:
            if not self._has_mirrored:
                self._leave()
                self._has_mirrored = True
            self._calls[phase](*self._share_and_catch_up())
        if self.some_have_left:
            self._share_and_catch_up()
        self._calls[Phase.LEAVE]()

    def _exchange(self, phase: Phase) -> dict[int, Phase]:
        """What each rank of the group is about to do."""
        if self._failure is not None:  # was caught within the context; the other ranks are gone
            raise self._failure
        self._drain()
        numbers = self._gather(int(phase), _WHAT)
        return {rank: Phase(number) for rank, number in numbers.items()}

    def _look_around(self, phases: Mapping[int, Phase]) -> Phase:
        """Take note of who does what. Returns what those do that still train, or LEAVE when nobody does."""
        training = {rank: phase for rank, phase in phases.items() if phase is not Phase.LEAVE}
        if not training:
            return Phase.LEAVE
        gone = sorted(phases.keys() - training.keys())
        if self.throws and gone:
            ranks = ", ".join(f"rank {rank}" for rank in gone)
            self._failure = StateError(
                f"{ranks} ran out of data within join(throw_on_early_termination=True), so all ranks stop"
            )
            raise self._failure
        if len(set(training.values())) > 1:
            self._transport.give_up("ranks have diverged")
            about = ", ".join(f"rank {rank} {phase}" for rank, phase in sorted(training.items()))
            self._failure = CollectiveError(
                f"the ranks have diverged within join(): what they do next is {about}. All ranks that have data must call "
                "forward, backward, clip_grad_norm_ and step in the same order"
            )
            raise self._failure
        self._turnout.source = min(training)
        self.some_have_left = bool(gone)
        if not self._divides_by_all:
            self._turnout.divisor = len(training)
        return training[self._turnout.source]

    def _agree_on_arguments(self, **flags: bool) -> None:
        mine = sum(bool(flag) << bit for bit, flag in enumerate(flags.values()))
        numbers = self._gather(mine, "the arguments of join()")
        for rank, number in numbers.items():
            if number != numbers[0]:
                texts = [
                    ", ".join(f"{name}={bool(bits >> bit & 1)}" for bit, name in enumerate(flags))
                    for bits in (numbers[0], number)
                ]
                raise RankMismatchError(
                    f"join() got different arguments on different ranks: rank 0 has {texts[0]}; rank {rank} has {texts[1]}"
                )

    def _gather(self, number: int, label: str) -> dict[int, int]:
        """A small number of each rank of the group, in the order of ranks. Collective."""
        control = self._transport.control
        mine = torch.tensor(number * control.size + control.rank, dtype=torch.float64, device=control.device)
        by_slice = self._transport.gather_scalar(mine, label=label).tolist()
        numbers = {int(value) % control.size: int(value) // control.size for value in by_slice}
        return dict(sorted(numbers.items()))

    def _share_and_catch_up(self, args: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        """The arguments of `source`. Where this rank has left, make the calls that `source` has noted. Collective."""
        notes, args = self._transport.control.tell((self._notes, args), self._turnout.source, _WHAT)
        if self._has_mirrored:
            for phase, noted_args in notes:
                self._calls[phase](*noted_args)
        return args


class Joining(Feature):
    """Announces the backward passes and steps of one wrapped model; on while its `join()` is open."""

    def __init__(self, join: Join, view: GradientView, turnout: Turnout) -> None:
        self._join = join
        self._view = view
        self._turnout = turnout

    def backward_begins(self) -> None:
        """All ranks that still train begin one."""
        self._join.announce(Phase.BACKWARD)

    def unscaling(self, indices: Sequence[int], inverse: float) -> None:
        """Ranks that have left look at their slices, too."""
        self._join.announce(Phase.UNSCALE, list(indices), inverse)

    def before_step(self, step: Step) -> None:
        """Ranks that have left go on stepping what they own, with the options of those that still train."""
        scale = None if step.grad_scale is None else float(step.grad_scale)
        self._join.announce(Phase.STEP, step.optimizer, pack_options(step.groups), scale)
        if self._join.some_have_left:
            self._view.follow(self._turnout.source)


def pack_options(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The options of an optimizer's groups, to be sent to another rank."""
    return [
        {name: on_cpu(value) for name, value in group.items() if name not in ("params", "param_names")}
        for group in groups
    ]


def take_options(groups: Sequence[dict[str, Any]], packed: Sequence[Mapping[str, Any]]) -> None:
    """Set the options of an optimizer's groups; tensors keep their place."""
    for group, options in zip(groups, packed, strict=True):
        for name, value in options.items():
            group[name] = _taken(group.get(name), value)


def _taken(mine: Any, value: Any) -> Any:
    """A value of an option, in the tensors that it has here."""
    if isinstance(mine, Tensor) and isinstance(value, Tensor):
        return mine.copy_(value)
    if type(mine) is not type(value):
        return value
    if isinstance(value, (list, tuple)) and len(mine) == len(value):
        return sequence_like(value, list(map(_taken, mine, value)))
    if isinstance(value, dict):
        value = copy(value)  # of its class
        value.update({name: _taken(mine.get(name), part) for name, part in value.items()})
    return value


def _do_nothing() -> None:
    pass
