"""One rank's steps through time, in the order in which zeroopt takes them.

forward    waits, bucket by bucket, for the parameters that the step before has sent (gradients' order backwards)
backward   fills buckets; a full one starts to travel; `most` travel at once, and stage 2 has few buffers to fill
step       waits for all sums, steps bucket by bucket, and starts the gather of each
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from .collectives import COSTS, LOCAL, NETWORK, Cost, Halves, Phase, Ranks
from .events import Clock, Process, Resource
from .stragglers import slowest
from .travelling import Travelling
from .workload import Load, Workload

PARTS = ("forward", "backward", "step", "communication", "waiting")
"""On what a rank's own thread spends its time. communication: what it does itself for collectives, sums and copies."""


@dataclass(frozen=True)
class Rules:
    """What bounds the overlap; as the options have it.

    Attributes:
        shards: whether a rank steps its own slices alone (stages 1 and 2), and gathers parameters.
        buffers: full gradient buckets that exist at once; None: each bucket has its own.
        most: buckets that travel while another one fills; 0: none.
    """

    shards: bool
    buffers: int | None
    most: int | None


@dataclass
class Lap:
    """A step.

    Attributes:
        seconds: from its forward to the next.
        parts: of that, by what the rank's own thread does.
        busy: seconds for which its links were in use.
    """

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    busy: dict[str, float] = field(default_factory=dict)


class Course:
    """What all courses have in common: a clock, links, and a thread that computes.

    Attributes:
        laps: the steps that have been taken.
    """

    def __init__(self, workload: Workload, ranks: Ranks, cost: Cost | None = None) -> None:
        self.clock = Clock()
        self.resources = {LOCAL: Resource(self.clock), NETWORK: Resource(self.clock)}
        self.laps: list[Lap] = []
        self._workload, self._ranks, self._machine = workload, ranks, ranks.machine
        self._cost = cost or COSTS[workload.transport]
        self._slow = self._machine.crowding * slowest(ranks.world_size, self._machine.noise)
        self._lap = Lap()
        self._taken = 0.0  # processor time of libraries, that has not been made up for

    def run(self, steps: int) -> Lap:
        """Take some steps, and return the last."""
        self.clock.start(self._steps(steps))
        self.clock.run()
        return self.laps[-1]

    def _steps(self, steps: int) -> Process:
        for _ in range(steps):
            start, before = self.clock.now, self._busy()
            self._lap = Lap()
            yield from self._step()
            self._lap.seconds = self.clock.now - start
            self._lap.busy = {where: seconds - before[where] for where, seconds in self._busy().items()}
            self.laps.append(self._lap)

    def _step(self) -> Process:
        raise NotImplementedError

    def _busy(self) -> Mapping[str, float]:
        return {where: resource.busy_s for where, resource in self.resources.items()}

    def _halves(self, num_bytes: float) -> Halves:
        return self._cost(self._ranks, num_bytes)

    def _travel(self, phases: tuple[Phase, ...]) -> Travelling:
        return Travelling(phases, self.resources, self._take)

    def _take(self, processor_s: float) -> None:
        self._taken += processor_s

    def _compute(self, operations: float, part: str, num_bytes: float = 0.0) -> Process:
        seconds = operations / self._machine.flops + num_bytes / self._machine.memory_bandwidth
        taken, self._taken = self._taken, 0.0
        with self._counted(part):
            yield self._slow * seconds + self._machine.crowding * taken

    def _own_work(self, process: Process) -> Process:
        """What a collective asks of this thread; the rest of it is waiting."""
        crowding = self._machine.crowding
        for asked in process:
            if isinstance(asked, float):
                with self._counted("communication"):
                    yield crowding * asked
            else:
                with self._counted("waiting"):
                    yield asked

    @contextmanager
    def _counted(self, part: str) -> Iterator[None]:
        start = self.clock.now
        yield
        self._lap.parts[part] += self.clock.now - start


class ZeroTraining(Course):
    """A rank that trains with zeroopt."""

    def __init__(self, workload: Workload, ranks: Ranks, rules: Rules, cost: Cost | None = None) -> None:
        super().__init__(workload, ranks, cost)
        self._rules = rules
        self._travelling: deque[tuple[Load, Travelling]] = deque()
        self._gathers: dict[int, Travelling] = {}  # of parameters, by the place of the bucket
        self._spreading: list[Travelling] = []  # gathers of sums that every rank needs

    def _step(self) -> Process:
        loads = self._workload.loads
        for place in reversed(range(len(loads))):
            if place in self._gathers:
                yield from self._own_work(self._gathers.pop(place).finish())
            yield from self._compute(loads[place].forward, "forward")
        for load in loads:
            yield from self._fill(load)
            yield from self._start_reduce(load)
        while self._travelling:
            yield from self._finish_oldest()
        for spreading in self._spreading:
            yield from self._own_work(spreading.finish())
        self._spreading.clear()
        yield from self._update(loads)

    def _fill(self, load: Load) -> Process:
        buffers = self._rules.buffers
        while buffers is not None and len(self._travelling) >= buffers:
            yield from self._finish_oldest()
        yield from self._compute(load.backward, "backward", load.packed)

    def _start_reduce(self, load: Load) -> Process:
        most = self._rules.most
        while most is not None and self._travelling and len(self._travelling) >= max(1, most):
            yield from self._finish_oldest()
        yield from self._pay_for_bucket()
        self._travelling.append((load, self._travel(self._halves(load.gradients).reduce_scatter)))
        if most == 0:
            yield from self._finish_oldest()
        for _, travelling in self._travelling:
            if travelling.asks:
                yield from self._own_work(travelling.progress())

    def _finish_oldest(self) -> Process:
        load, oldest = self._travelling.popleft()
        yield from self._own_work(oldest.finish())
        if not self._rules.shards:  # an all-reduce is a reduce-scatter and an all-gather
            self._spreading.append(self._travel(self._halves(load.gradients).all_gather))

    def _update(self, loads: tuple[Load, ...]) -> Process:
        share = 1 / self._ranks.world_size if self._rules.shards else 1.0
        for place, load in enumerate(loads):
            yield from self._compute(0.0, "step", load.stepped * share)
            if not self._rules.shards:
                continue
            yield from self._pay_for_bucket()
            gather = self._gathers[place] = self._travel(self._halves(load.parameters).all_gather)
            yield from self._own_work(gather.progress())

    def _pay_for_bucket(self) -> Process:
        with self._counted("communication"):
            yield self._machine.crowding * self._machine.bucket_s
