"""A case's ranks, the watching, and what was held when."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.launch import Plan, RankFailed, run_ranks, running_ranks
from bench.memory.methods import METHODS
from bench.memory.models import MODELS, count_parameters
from bench.memory.rank import Case, Told, work, write_checkpoint
from bench.watch import Moments, Watch, above_first, held_bytes

INTERVAL_S = 0.02
TIMEOUT_S = 600.0
PHASES = ("build", "wrap", "load", "first forward, backward", "first step", "later steps")


@dataclass(frozen=True)
class Measured:
    """What all ranks of a case held together, by their number, above what they held before they built the model. In bytes; of
    pages that ranks share, each has its part, and mapped files do not count.

    Attributes:
        problem: why there are no figures; None where there are.
        peaks: the most in each phase, in their order.
        held: after the last step, its gradients cleared as the loop does it.
        own_peak: the mean over ranks of the most that each held, by the kernel's own mark, which misses nothing; pages that ranks
            share count in full.
        samples: how many moments were looked at.
    """

    case: Case
    parameters: int
    problem: str | None
    peaks: dict[str, float]
    held: float
    own_peak: float
    samples: int

    @property
    def peak(self) -> float:
        """From wrapping on."""
        return max(held for phase, held in self.peaks.items() if phase != "build")

    @property
    def peak_phase(self) -> str:
        return next(phase for phase, held in self.peaks.items() if held == self.peak and phase != "build")

    def a_parameter(self, held: float) -> float:
        return held / self.parameters

    @property
    def formula(self) -> float:
        """Bytes a parameter."""
        return METHODS[self.case.method].formula(self.case)


def measure(case: Case, interval_s: float = INTERVAL_S, timeout_s: float = TIMEOUT_S) -> Measured:
    """In processes of its own. Whatever goes wrong there is in the answer."""
    obstacle = case.why_not()
    if obstacle is not None:
        return failed(case, 0, obstacle)
    parameters = count_parameters(MODELS[case.model])
    plan = Plan(case.world_size, case.threads, timeout_s=timeout_s)
    try:
        with TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint" if case.after_load else None
            if checkpoint is not None:
                run_ranks(plan, write_checkpoint, case, checkpoint)
            watch = Watch()
            with running_ranks(plan, work, case, checkpoint, watch) as ranks:
                moments = watch.moments(ranks, interval_s, held_bytes)
                told: list[Told] = ranks.values()
    except RankFailed as failure:
        return failed(case, parameters, str(failure))
    own_peak = sum(rank.own_peak for rank in told) / case.world_size
    peaks = most_by_phase(moments, told[0].phases)
    held = sum(above_first(moments)[-1]) / case.world_size
    return Measured(case, parameters, None, peaks, held, own_peak, len(moments))


def failed(case: Case, parameters: int, problem: str) -> Measured:
    return Measured(case, parameters, problem, {}, 0.0, 0.0, 0)


def most_by_phase(moments: Moments, phases: list[tuple[float, str]]) -> dict[str, float]:
    """The most of a rank in the mean, in each phase that was looked at.

    Args:
        phases: as `Told` has them, of one rank; the others are about where it is.
    """
    begins = [begin for begin, _ in phases]
    most: dict[str, float] = {}
    for (moment, _), held in zip(moments, above_first(moments), strict=True):
        index = bisect_right(begins, moment) - 1
        if index >= 0:
            phase = phases[index][1]
            most[phase] = max(most.get(phase, 0.0), sum(held) / len(held))
    return {phase: most[phase] for phase in PHASES if phase in most}
