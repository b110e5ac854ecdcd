"""What all rounds of a method come to: medians, spread, and whether it trained as the others did."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.compare.launch import Run
from bench.compare.methods import ALONE, DDP, METHODS
from bench.compare.rank import Figures
from bench.compare.setting import Setting

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}  # of the loss, at every step
ROUNDED_STATE_TOLERANCE = 0.05  # where moments are kept in 16 or 8 bits
ADAMW_BYTES = {"float32": 28, "bfloat16": 30}  # read and written an element; the latter with float32 masters


@dataclass(frozen=True)
class Spread:
    """Quartiles."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Row:
    """One method in one setting.

    Attributes:
        problem: why there are no figures; None where there are.
        wrong: how its losses differ from those of the others; None where they agree.
        step_s, forward_backward_s, optimizer_s: over the steps of all rounds, each the mean over ranks.
        cpu_s: of all ranks, a step.
        sent_bytes: by a rank in a step; None where nobody counts.
        pss_bytes: the most that ranks held together at one moment, by their number, above a rehearsal.
        resident_bytes, device_bytes: the most that any rank held.
        formula: bytes a parameter that a rank should hold.
        wrap_s: of the slowest rank.
        losses: mean over ranks, by step.
    """

    method: str
    setting: Setting
    problem: str | None
    wrong: str | None = None
    step_s: Spread | None = None
    forward_backward_s: Spread | None = None
    optimizer_s: Spread | None = None
    cpu_s: float | None = None
    sent_bytes: float | None = None
    pss_bytes: float | None = None
    resident_bytes: int | None = None
    device_bytes: int | None = None
    formula: float | None = None
    wrap_s: float | None = None
    losses: tuple[float, ...] = ()

    @property
    def failed(self) -> bool:
        """It could have run and has not, or has not trained as others did."""
        could_run = METHODS[self.method].why_not(self.setting) is None
        return self.wrong is not None or (self.problem is not None and could_run)

    @property
    def median_s(self) -> float | None:
        return None if self.step_s is None else self.step_s.median

    @property
    def tokens_a_second(self) -> float | None:
        return None if self.step_s is None else self.setting.tokens_a_step / self.step_s.median

    @property
    def bytes_a_parameter(self) -> float | None:
        """Of the device where there is one; else of the proportional set size."""
        held = self.pss_bytes if self.device_bytes is None else self.device_bytes
        return None if held is None else held / self.setting.parameters


@dataclass(frozen=True)
class Limit:
    """Seconds of a step that nothing but arithmetic and memory slows down, by their parts."""

    forward_backward_s: float
    optimizer_s: float
    collectives_s: float

    @property
    def step_s(self) -> float:
        return self.forward_backward_s + self.optimizer_s + self.collectives_s


@dataclass(frozen=True)
class Comparison:
    """All methods in one setting."""

    setting: Setting
    rows: list[Row]
    limit: Limit | None

    @property
    def baseline(self) -> Row | None:
        """DDP's row, with figures or without."""
        return self.row(DDP)

    def row(self, method: str) -> Row | None:
        return next((row for row in self.rows if row.method == method), None)


def summarize(runs: Sequence[Run]) -> list[Comparison]:
    """One comparison for each setting, in the order in which settings and methods first come."""
    return [compare(setting, runs) for setting in dict.fromkeys(run.setting for run in runs)]


def compare(setting: Setting, runs: Sequence[Run]) -> Comparison:
    here = [run for run in runs if run.setting == setting]
    names = dict.fromkeys(run.method for run in here)
    rows = [row_of([run for run in here if run.method == name]) for name in names]
    expected = reference_losses(rows)
    judged = [Row(**{**vars(row), "wrong": disagreement(row, expected)}) for row in rows]
    return Comparison(setting, judged, limit_of(here, judged))


def row_of(runs: Sequence[Run]) -> Row:
    """Of one method in one setting."""
    first = runs[0]
    done = [run for run in runs if run.ranks]
    if len(done) < len(runs):
        return Row(first.method, first.setting, next(run.problem for run in runs if not run.ranks))
    ranks = [run.ranks or [] for run in done]
    figures = [figure for run in ranks for figure in run]
    forward_backward = [mean for run in ranks for mean in mean_over_ranks([f.forward_backward_s for f in run])]
    optimizer = [mean for run in ranks for mean in mean_over_ranks([f.optimizer_s for f in run])]
    steps = max(1, len(ranks[0][0].optimizer_s))
    sent = [
        run_sent / steps / first.setting.world_size for run_sent in map(sent_together, ranks) if run_sent is not None
    ]
    device_bytes = [f.device_bytes for f in figures if f.device_bytes is not None]
    return Row(
        first.method,
        first.setting,
        None,
        step_s=Spread.of([sum(pair) for pair in zip(forward_backward, optimizer, strict=True)]) if optimizer else None,
        forward_backward_s=Spread.of(forward_backward) if optimizer else None,
        optimizer_s=Spread.of(optimizer) if optimizer else None,
        cpu_s=statistics.median(sum(f.cpu_s for f in run) / steps for run in ranks) if optimizer else None,
        sent_bytes=statistics.median(sent) if sent and optimizer else None,
        pss_bytes=max((run.together or 0) / first.setting.world_size for run in done),
        resident_bytes=max(f.resident_bytes for f in figures),
        device_bytes=max(device_bytes, default=None),
        formula=METHODS[first.method].formula(first.setting),
        wrap_s=statistics.median(max(f.wrap_s for f in run) for run in ranks),
        losses=tuple(mean_over_ranks([f.losses for f in ranks[0]])),
    )


def mean_over_ranks(values_by_rank: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*values_by_rank, strict=True)]


def sent_together(ranks: Sequence[Figures]) -> int | None:
    sent = [figures.sent_bytes for figures in ranks]
    return None if None in sent else sum(number for number in sent if number is not None)


def reference_losses(rows: Sequence[Row]) -> tuple[float, ...]:
    """DDP's, or else those of the first method that communicates."""
    candidates = [row for row in rows if row.losses and METHODS[row.method].communicates]
    preferred = [row for row in candidates if row.method == DDP]
    return next((row.losses for row in [*preferred, *candidates]), ())


def disagreement(row: Row, expected: Sequence[float]) -> str | None:
    """None where losses agree, where there are none, and for the bound, which trains something else."""
    method = METHODS[row.method]
    if not row.losses or not method.communicates:
        return None
    tolerance = TOLERANCE[row.setting.precision]
    if method.rounds_state:
        tolerance = max(tolerance, ROUNDED_STATE_TOLERANCE)
    for step, (loss, other) in enumerate(zip(row.losses, expected, strict=False), start=1):
        if not abs(loss - other) <= tolerance:  # so for NaN
            return f"loss {loss:.4f} instead of {other:.4f} in step {step}"
    return None


def limit_of(runs: Sequence[Run], rows: Sequence[Row]) -> Limit | None:
    """Forward and backward of the bound; the optimizer's and the collectives' bytes by what memory was measured to give.

    A rank steps its part of the elements. Of the gradients and of the parameters it gets what N - 1 others have of its own part
    and theirs: 2 (N - 1)/N of their bytes.
    """
    bandwidths = [figures.bandwidth for run in runs for figures in run.ranks or [] if figures.bandwidth]
    alone = next((row for row in rows if row.method == ALONE), None)
    if not bandwidths or alone is None or alone.forward_backward_s is None:
        return None
    setting = alone.setting
    share = setting.parameters / setting.world_size
    element_bytes = 2 if setting.precision == "bfloat16" else 4
    return Limit(
        alone.forward_backward_s.median,
        ADAMW_BYTES[setting.precision] * share / statistics.median(b.optimizer for b in bandwidths),
        2 * (setting.world_size - 1) * element_bytes * share / statistics.median(b.copy for b in bandwidths),
    )
