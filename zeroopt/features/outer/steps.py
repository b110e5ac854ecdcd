"""`outer_optimizer`: ranks, or groups of them, that train alone have an outer step every k steps (DiLoCo).

Douillard et al., 2023, arXiv:2311.08105; in fragments while training goes on: 2025, arXiv:2501.18512. In every k-th step the mean of
what the ranks have changed since the last time is the gradient of an outer optimizer, which steps what they had in common:

    anchor ← OuterOptimizer(anchor, anchor − mean of parameters)        parameters ← kept · parameters + (1 − kept) · anchor

A group that has no data leaves, or comes back: it sits out outer steps. It takes part in their collectives, for the slices that its
ranks keep, brings what it has trained so far to the first one and nothing to the others, and takes over the anchor each time.
Before whatever is collective, all ranks of the average group tell each other what they are at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import torch

from ... import ops
from ...collectives import ControlGroup, Transport, Wire
from ...collectives.select import connect_transport
from ...errors import CollectiveError, ConfigError, KernelUnavailableError
from ...feature import Feature, Step
from ...options.config import Config
from ...options.outer import share_kept
from ...options.precision import CODE_BITS
from ...own_storage import with_own_storage
from ...plan.params import ParamState
from ...storage.bucket import Bucket
from ...storage.segment import Segment
from ...trained import Trained
from ..averaging import ParameterAverage
from .anchor import Anchor
from .exchange_buffers import ExchangeBuffers
from .fragments import Due, Schedule
from .optimizer import PlainOptions, make_outer, pack_options, take_options
from .wires import outer_wire

T = TypeVar("T")

_WHAT = "an outer step"  # for messages


class Doing(IntEnum):
    """What a rank is at."""

    SITTING = 0
    STEPPING = 1
    SAVING = 2


class Call(NamedTuple):
    """What a rank of the average group is about to do.

    Attributes:
        optimizer: for which of the model's optimizers, by number.
        step: the number of the step.
    """

    doing: Doing
    optimizer: int = 0
    step: int = 0


@dataclass(frozen=True)
class _Heard:
    """What the ranks of the average group do.

    Attributes:
        call: of those that do not sit out; of all, where all do.
        busy: those that do not, by their rank in the group.
    """

    call: Call
    busy: Sequence[int]


class OuterSteps(Feature):
    """The outer steps of one optimizer.

    Attributes:
        control: of the average group.
        optimizer: the outer optimizer, of this rank's slices of the anchors.
    """

    def __init__(self, trained: Trained, average: ParameterAverage, transport: Transport) -> None:
        config = trained.config
        assert config.average_every is not None and config.outer_optimizer is not None
        self._trained = trained
        self._average = average
        self.control = average.control
        self._transport = transport
        self._schedule = Schedule(config.average_every, config.outer_fragments, config.outer_delay)
        self._kept = share_kept(config)
        self._buffers = ExchangeBuffers(transport, trained.params[0].param.device)
        self._anchors: dict[Bucket, Anchor] = {}
        self._unbrought: set[int] = set()  # fragments that this rank has trained since they last set out
        self._due = Due()
        self._contributors: Sequence[int] = ()  # by fragment, how many ranks have trained it since it last set out
        self._must_compare = True  # the anchors, which are alike from then on
        self._make_anchors()
        self.optimizer = make_outer(config.outer_optimizer, [anchor.param for anchor in self._anchors.values()])

    # In a step.

    def on_gradients(self, step: Step) -> None:
        """Count the step, one that is skipped too, and see what it has to do with outer steps: then all parameters may change."""
        self._average.check_counts()
        self.begin()
        self._average.steps += 1
        self._unbrought = set(range(self._schedule.num_fragments))
        self._due = self._schedule.due(self._average.steps)
        if self._due:
            self._contributors = self._compare(self._tell(Doing.STEPPING))
        step.changes_all = bool(self._due)

    def stepped(self, step: Step, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        """A bucket is gathered when what has come from others is in its own range."""
        return self._exchange(buckets, self._due) if step.changes_all else buckets

    def _exchange(self, buckets: Iterator[Bucket], due: Due, *, sits: bool = False) -> Iterator[Bucket]:
        """Do what is due with each bucket, and yield it. What one waits for comes while the next ones are stepped. Collective."""

        def set_out(anchor: Anchor, fragment: int) -> None:
            contributors = self._contributors[fragment]
            if contributors:
                anchor.set_out(contributes=fragment in self._unbrought, contributors=contributors)

        def step(anchor: Anchor, fragment: int) -> None:
            anchor.step(self.optimizer)

        def arrive(anchor: Anchor, fragment: int) -> None:
            anchor.arrive(0.0 if sits and fragment not in self._unbrought else self._kept)

        for fragments, act in ((due.setting_out, set_out), (due.stepping, step), (due.arriving, arrive)):
            buckets = _one_behind(self._acting(buckets, fragments, act))
        yield from buckets
        self._unbrought -= due.setting_out

    def _acting(
        self, buckets: Iterator[Bucket], fragments: frozenset[int], act: Callable[[Anchor, int], None]
    ) -> Iterator[Bucket]:
        for bucket in buckets:
            fragment = self._fragment_of(bucket)
            if fragment in fragments:
                act(self._anchors[bucket], fragment)
            yield bucket

    def _fragment_of(self, bucket: Bucket) -> int:
        return self._schedule.fragment_of(self._trained.buckets.index(bucket))

    # Without data.

    def follow(self, heard: _Heard) -> None:
        """Do what the others do, without having trained. Collective."""
        self._contributors = self._compare(heard)
        if heard.call.doing is Doing.SAVING:
            self._gather_state()
            return
        self._average.steps = heard.call.step
        with self._trained.rewriting_parameters():
            self._go_along(self._schedule.due(heard.call.step))
            self._take_over_anchors()

    def conclude(self, heard: _Heard) -> None:
        """Nobody trains any more: bring in whatever ranks have trained, and let all have the same, from which they may go on together.
        Collective."""
        self._contributors = self._compare(heard)
        self._average.steps = max(steps for (steps,) in self.control.numbers([self._average.steps], _WHAT))
        every = frozenset(range(self._schedule.num_fragments))
        with self._trained.rewriting_parameters():
            self._go_along(Due(stepping=every, arriving=every))
            self._go_along(Due.at_once(every))
            self._take_over_anchors()

    def _go_along(self, due: Due) -> None:
        for _ in self._exchange(self._trained.stepper.order(), due, sits=True):
            pass

    def _take_over_anchors(self) -> None:
        """What has been brought in, or was never trained here, becomes the anchor."""
        self._trained.state_dicts.consolidated = None
        for bucket, anchor in self._anchors.items():
            if self._fragment_of(bucket) not in self._unbrought:
                anchor.become_parameters()

    # What the ranks tell each other.

    def begin(self) -> None:
        """Look at the parameters as they are now; where there is no anchor yet, they are."""
        self._make_anchors()
        self._trained.follow_writes()
        for anchor in self._anchors.values():
            if not anchor.is_set:
                anchor.take_over()
                self._must_compare = True

    def _make_anchors(self) -> None:
        """Have one for each bucket that there is."""
        buckets = self._trained.buckets
        if list(self._anchors) == buckets:
            return
        before = self._anchors
        self._anchors = {
            bucket: before.get(bucket) or Anchor(bucket, self._transport, self._buffers, self._make_wire(bucket))
            for bucket in buckets
        }
        if before:
            for bucket in before.keys() - self._anchors.keys():
                self.optimizer.state.pop(before[bucket].param, None)
            self.optimizer.param_groups[0]["params"][:] = [anchor.param for anchor in self._anchors.values()]

    def _make_wire(self, bucket: Bucket) -> Wire:
        def now() -> tuple[int, int]:
            # Ranks may go on from what one of them has saved, with its seed.
            return (self._trained.stepper.seed * 31 + self.control.rank) % 2**63, self._average.steps

        return outer_wire(self._trained.config.outer_dtype, now, bucket.key)

    def _tell(self, doing: Doing) -> _Heard:
        """Say what this rank is about to do, and hear what the others are. Collective over the average group."""
        return _hear(self.control, Call(doing, self._trained.number, self._average.steps))

    def _compare(self, heard: _Heard) -> list[int]:
        """See whether what the ranks have goes together. Collective over the average group.

        Returns:
            By fragment, how many ranks have trained it since it last set out.

        Raises:
            CollectiveError: it does not; on all ranks.
        """
        stages = [anchor.stage for anchor in self._anchors.values()]
        options = pack_options(self.optimizer)
        digests = [
            _digest([self._trained.generations, stages]),
            _digest([anchor.digest() for anchor in self._anchors.values()]) if self._must_compare else 0,
            _digest(options),
        ]
        flags = [int(fragment in self._unbrought) for fragment in range(self._schedule.num_fragments)]
        everyone = self.control.numbers([*digests, *flags], _WHAT)
        every = range(self.control.size)
        _check_alike(everyone, 0, every, "buckets in different orders, or states of different steps", _ADVICE)
        _check_alike(everyone, 1, every, "different anchors", f"{_ADVICE}, and wrap with sync_module_states=True")
        _check_alike(everyone, 2, heard.busy, "outer optimizers with different options", "set the same on all of them")
        self._must_compare = False
        if 0 < len(heard.busy) < self.control.size:  # schedulers stand still where a rank sits out
            take_options(self.optimizer, self.control.tell(options, heard.busy[0], _WHAT))
        return [sum(column) for column in list(zip(*everyone, strict=True))[len(digests) :]]

    # What is saved.

    def save_state(self) -> dict[torch.Tensor, ParamState]:
        """By the shards of segments, all that belongs to outer steps; nothing before the first step. What is on its way has
        arrived at the anchor. Collective over the average group."""
        if not all(anchor.is_set for anchor in self._anchors.values()):
            return {}
        self._compare(self._tell(Doing.SAVING))
        return self._gather_state()

    def _gather_state(self) -> dict[torch.Tensor, ParamState]:
        self._finish()
        saved: dict[torch.Tensor, ParamState] = {}
        for bucket, anchor in self._anchors.items():
            state = anchor.gather_state(self.optimizer)
            for segment in bucket.segments:
                saved[segment.shard] = {name: _part_of(value, segment) for name, value in state.items()}
        return saved

    def _finish(self) -> None:
        """Let what is on its way arrive at the anchor, which has yet to become the parameters. Collective."""
        for anchor in self._anchors.values():
            anchor.step(self.optimizer)
        for anchor in self._anchors.values():
            anchor.collect()

    def save_options(self) -> PlainOptions:
        """Those of the outer optimizer."""
        return pack_options(self.optimizer)

    def load_state(self, state: dict[torch.Tensor, ParamState], options: PlainOptions) -> None:
        """Go on from what was saved, of whichever run; without any, the next step begins anew. Collective over the average group
        where something is on its way.

        Args:
            state: by the shards of segments.
        """
        self._finish()
        self._make_anchors()
        arriving = self._schedule.on_the_way(self._average.steps)
        for bucket, anchor in self._anchors.items():
            pieces = {s: state[s.shard] for s in bucket.segments if s.shard in state}
            anchor.load_state(self.optimizer, pieces, arrived=self._fragment_of(bucket) in arriving)
        take_options(self.optimizer, options)
        self._unbrought = set(range(self._schedule.num_fragments)) - self._schedule.due(self._average.steps).setting_out
        self._must_compare = True


def connect_outer_steps(trained: Trained, average: ParameterAverage | None) -> OuterSteps | None:
    """The outer steps that the options of an optimizer ask for, if they do. Collective over the average group."""
    config = trained.config
    if average is None or config.outer_optimizer is None:
        return None
    device = trained.params[0].param.device
    return OuterSteps(
        trained,
        average,
        connect_transport(
            transport_across(config), average.control.group, device, nests=config.outer_dtype not in CODE_BITS
        ),
    )


def transport_across(config: Config) -> str:
    """Which transport to take between the ranks that average: what was asked for, where that is messages."""
    return config.transport if config.transport in ("pairwise", "all_to_all", "torch") else "auto"


def check_outer_dtype(config: Config, dtypes: Iterable[torch.dtype], device: torch.device) -> None:
    """Raise ConfigError where what parameters of these dtypes have to tell cannot travel as was asked for, and
    KernelUnavailableError where a device cannot encode it."""
    if config.outer_dtype in CODE_BITS and (missing := ops.missing_kernels(device)) is not None:
        raise KernelUnavailableError(f"outer_dtype={config.outer_dtype!r} needs kernels, and there are none: {missing}")
    if config.outer_dtype is not None and torch.float64 in dtypes:
        raise ConfigError(
            f"outer_dtype={config.outer_dtype} does not fit parameters of torch.float64: leave it at None"
        )


def sit_out(of_model: Sequence[OuterSteps]) -> bool:
    """Take part in what the others do next with outer steps, without having trained. Collective over the average group.

    Args:
        of_model: those of all optimizers of a model.

    Returns:
        Whether others still train. Where nobody does, all that ranks have trained has been brought in.
    """
    for one in of_model:
        one.begin()
    while True:
        heard = _hear(of_model[0].control, Call(Doing.SITTING))
        if heard.call.doing is Doing.SITTING:
            for one in of_model:
                one.conclude(heard)
            return False
        of_model[heard.call.optimizer].follow(heard)
        if heard.call.doing is Doing.STEPPING and heard.call.optimizer == len(of_model) - 1:
            return True


def _hear(control: ControlGroup, call: Call) -> _Heard:
    """What all ranks of the average group are about to do. Collective over it.

    Raises:
        CollectiveError: those that do not sit out are not about to do the same; on all ranks.
    """
    everyone = control.numbers(call, _WHAT)
    busy = [rank for rank, (doing, *_) in enumerate(everyone) if doing != Doing.SITTING]
    _check_alike(everyone, 0, busy, "different things to do", "let all save states after the same step")
    _check_alike(
        everyone, 1, busy, "steps of different optimizers to take", "step optimizers in the same order on all of them"
    )
    _check_alike(
        everyone,
        2,
        busy,
        "taken different numbers of steps",
        "call model.sit_out() or model.leave() where there is no data",
    )
    doing, optimizer, step = everyone[busy[0]] if busy else everyone[0]
    return _Heard(Call(Doing(doing), optimizer, step), busy)


def _check_alike(rows: Sequence[Sequence[int]], column: int, ranks: Iterable[int], what: str, advice: str) -> None:
    """Raise CollectiveError where some of the ranks, which have told each other a row each, differ in a column."""
    by_value: dict[int, int] = {}
    for rank in ranks:
        by_value.setdefault(rows[rank][column], rank)
    if len(by_value) > 1:
        first, other, *_ = by_value.values()
        raise CollectiveError(f"{_WHAT}: ranks {first} and {other} of the average group have {what}; {advice}")


_ADVICE = "load states of one step of one run on all of them"


def _digest(value: Any) -> int:
    """48 bits of a hash, which int64 holds."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:6], "big")


def _part_of(value: Any, segment: Segment) -> Any:
    return with_own_storage(segment.view_in(value)) if isinstance(value, torch.Tensor) else value


def _one_behind(items: Iterator[T]) -> Iterator[T]:
    """Yield each when the next one has come."""
    held: list[T] = []
    for item in items:
        yield from held
        held = [item]
    yield from held
