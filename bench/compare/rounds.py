"""All methods in turn, again and again, so that a busy moment of the machine favours none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.compare.launch import Run, run_method
from bench.compare.rank import Job
from bench.compare.setting import Setting


@dataclass(frozen=True)
class Effort:
    """How long and how closely to look.

    Attributes:
        steps: that are timed, a round.
        interval_s: between two looks at the memory of the ranks.
        timeout_s: for one method in one round.
    """

    rounds: int
    steps: int
    interval_s: float
    timeout_s: float


def run_rounds(settings: Sequence[Setting], methods: Sequence[str], effort: Effort, console: Console) -> list[Run]:
    """Every method in every setting, `effort.rounds` times; the first round also takes a timeline."""
    runs: list[Run] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=effort.rounds * len(settings) * len(methods))
        for setting in settings:
            for round_number in range(effort.rounds):
                for method in methods:
                    title = f"{method}, {setting.world_size} ranks, round {round_number + 1}"
                    progress.update(task, description=title)
                    job = Job(method, setting, effort.steps, timeline=round_number == 0)
                    runs.append(run_method(job, effort.interval_s, effort.timeout_s))
                    progress.advance(task)
                    console.print(f"{title}: {told(runs[-1])}", markup=False, highlight=False, soft_wrap=True)
    return runs


def told(run: Run) -> str:
    """In a few words."""
    if run.ranks is None:
        return run.problem or "failed"
    first = run.ranks[0]
    times = sorted(a + b for a, b in zip(first.forward_backward_s, first.optimizer_s, strict=True))
    return f"{1e3 * times[len(times) // 2]:.1f} ms a step, loss {first.losses[-1]:.3f}"
