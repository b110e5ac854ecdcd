"""Runs whose ranks are killed and started again."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.kills.kinds import Kind
from bench.kills.marks import MOMENTS, Marks
from bench.kills.training import End, Task, train
from bench.launch import Plan, Ranks, running_ranks
from zeroopt.elastic.place import MEMORY

STEPS = 60
KILLED_IN = MOMENTS[1:-1]
ONCE_A_START = ("wrap", "load", "first step")
STEPS_BEFORE_A_KILL = 6
MOST_DELAY_S = 0.004  # after a rank has come to the moment
LOOK_S = 0.0002
GRACE_S = 60.0  # in which the ranks that were not killed end by themselves


@dataclass
class Tally:
    """What came of it.

    Attributes:
        kills: by the moment in which the rank was when it died.
        hung: starts after whose kill others did not end by themselves.
        ended_in_s: seconds from a kill until all others had ended.
        going_on_in_s: seconds from when all had ended to the first forward of the next start.
        steps_again: steps that all ranks had done, and that were done again.
    """

    kills: Counter[str] = field(default_factory=Counter)
    hung: int = 0
    ended_in_s: list[float] = field(default_factory=list)
    going_on_in_s: list[float] = field(default_factory=list)
    steps_again: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Kill:
    """When to kill whom.

    Attributes:
        steps: that the rank has done before, since its start; for those moments that come again.
    """

    rank: int
    moment: str
    steps: int
    delay_s: float

    @staticmethod
    def draw(draws: random.Random, ranks: int) -> Kill:
        """One at random."""
        moment = draws.choice(KILLED_IN)
        return Kill(
            draws.randrange(ranks), moment, draws.randint(0, STEPS_BEFORE_A_KILL), draws.uniform(0, MOST_DELAY_S)
        )

    def is_due(self, marks: Marks, begun: int | None) -> bool:
        """Whether the rank is there."""
        if marks.moment(self.rank) != self.moment:
            return False
        return self.moment in ONCE_A_START or (begun is not None and marks.step(self.rank) >= begun + self.steps)


@dataclass(frozen=True)
class Outcome:
    """Digests of the parameters of all ranks, and of the state: one each, where all ranks, and the copies of all, have the same."""

    params: frozenset[str]
    state: frozenset[str]

    @staticmethod
    def of(ends: list[End]) -> Outcome:
        """That of all ranks, by rank, of which the first has the whole state."""
        kept = [end.kept for end in ends if end.kept is not None]
        all_of = [*(end.trained for end in ends), *kept]
        firsts = [ends[0].trained, *kept[:1]]
        return Outcome(frozenset(one.params for one in all_of), frozenset(one.state for one in firsts))

    @property
    def is_one(self) -> bool:
        """Whether all have the same."""
        return len(self.params) == len(self.state) == 1


class Run:
    """One run in a folder of its own, started again after each kill.

    Args:
        kind: of the training.
        hosts: how many hosts ranks are taken to be on. Of several, all of a host are killed at once, and its memory is lost, unless the
            others have not loaded since one was lost before.
        any_ranks: draws the number of ranks of each start, 1, 2, 4 … up to that of the plan; None: always that.
    """

    def __init__(
        self,
        plan: Plan,
        kind: Kind,
        tally: Tally,
        *,
        without_disk: bool,
        hosts: int,
        any_ranks: random.Random | None,
    ) -> None:
        self._plan, self._tally, self._any_ranks = plan, tally, any_ranks
        self._folder = Path(tempfile.mkdtemp(prefix="zeroopt-kills-"))
        micro_batches = None if any_ranks is None else plan.world_size
        self._task = Task(self._folder, STEPS, kind, micro_batches, without_disk, hosts)
        self._marks = Marks(self._folder / "marks", plan.world_size)
        self._done = 0
        self._has_begun = False  # the present start, to train
        self._all_ended_at: float | None = None

    def to_its_end(self, kills: list[Kill]) -> Outcome:
        """Kills for which there was no moment are not done."""
        try:
            ends = None
            for kill in [*kills, None]:
                ends = self._start(kill)
                if ends is not None:
                    break
            assert ends is not None
            return Outcome.of(ends)
        finally:
            shutil.rmtree(self._folder)
            shutil.rmtree(Path(MEMORY, self._folder.name), ignore_errors=True)

    def _start(self, kill: Kill | None) -> list[End] | None:
        """What the ranks have returned; None where one was killed."""
        self._marks.clear()
        plan = self._plan
        if self._any_ranks is not None:
            plan = replace(plan, world_size=2 ** self._any_ranks.randrange(plan.world_size.bit_length()))
        if kill is not None:
            kill = replace(kill, rank=kill.rank % plan.world_size)
        with running_ranks(plan, train, self._task) as ranks:
            if self._watch(ranks, kill):
                assert kill is not None
                self._do(kill, ranks)
                return None
            return ranks.values()

    def _watch(self, ranks: Ranks, kill: Kill | None) -> bool:
        """Wait until a kill is due; False when all have returned before."""
        begun: int | None = None
        self._has_begun = False
        while kill is None or not kill.is_due(self._marks, begun):
            if begun is None and self._marks.moment(0) == "forward":
                begun, self._has_begun = self._marks.step(0), True
                self._note_going_on(begun)
            if ranks.have_returned(within_s=LOOK_S):
                return False
        return True

    def _note_going_on(self, begun: int) -> None:
        if self._all_ended_at is not None:
            self._tally.going_on_in_s.append(time.monotonic() - self._all_ended_at)
            self._tally.steps_again.append(self._done - begun)
            self._all_ended_at = None

    def _do(self, kill: Kill, ranks: Ranks) -> None:
        time.sleep(kill.delay_s)
        begin = time.monotonic()
        size = len(ranks.processes)
        hosts = self._task.hosts_of(size)
        with_it = next(host for host in hosts if kill.rank in host) if len(hosts) > 1 else [kill.rank]
        for rank in with_it:
            ranks.processes[rank].kill()
        for process in ranks.processes:
            process.join(max(0.0, begin + GRACE_S - time.monotonic()))
        self._tally.hung += any(process.is_alive() for process in ranks.processes)
        self._tally.kills[self._marks.moment(kill.rank)] += 1
        self._all_ended_at = time.monotonic()
        self._tally.ended_in_s.append(self._all_ended_at - begin)
        self._done = max(self._done, min(self._marks.step(rank) for rank in range(size)))
        if len(hosts) > 1 and self._has_begun:
            shutil.rmtree(self._task.memory_of(kill.rank, size), ignore_errors=True)
