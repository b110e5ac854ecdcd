"""The comparison as pictures, one kind a file: needs matplotlib.

look.py         what they have in common: colours, titles, whose bar is whose
times.py        the step by method, against the limit and DDP
memory.py       bytes a parameter by method, against the formula
scaling.py      speed and memory over what a sweep varies
timelines.py    one step of some methods, and what is under way meanwhile
largest.py      the largest model in so many bytes
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.compare.budget import Search
from bench.compare.launch import Run
from bench.compare.plots.largest import draw_largest
from bench.compare.plots.look import save
from bench.compare.plots.memory import draw_memory
from bench.compare.plots.scaling import draw_scaling
from bench.compare.plots.timelines import draw_timelines, traces_of
from bench.compare.plots.times import draw_times
from bench.compare.summary import Comparison
from bench.compare.sweep import AXES, families

__all__ = ["draw_all", "draw_largest", "draw_memory", "draw_scaling", "draw_timelines", "draw_times", "save"]


def draw_all(
    comparisons: Sequence[Comparison], runs: Sequence[Run], searches: Sequence[Search], folder: Path
) -> list[Path]:
    """Pictures of each setting, curves over what differs between settings, and what the searches have found."""
    return [
        *(path for i, comparison in enumerate(comparisons) for path in draw_comparison(comparison, runs, folder, i)),
        *draw_sweeps(comparisons, folder),
        *(
            save(draw_largest(search.found, search.budget_mb), folder / f"largest-{i}.png")
            for i, search in enumerate(searches)
        ),
    ]


def draw_comparison(comparison: Comparison, runs: Sequence[Run], folder: Path, number: int) -> list[Path]:
    paths = []
    if any(row.step_s for row in comparison.rows):
        paths.append(save(draw_times(comparison), folder / f"time-{number}.png"))
    if any(row.bytes_a_parameter for row in comparison.rows):
        paths.append(save(draw_memory(comparison), folder / f"memory-{number}.png"))
    traces = traces_of(runs, comparison.setting)
    if traces:
        paths.append(save(draw_timelines(traces, comparison), folder / f"timeline-{number}.png"))
    return paths


def draw_sweeps(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    paths = []
    for axis in AXES.values():
        together = families(comparisons, axis)
        for i, family in enumerate(together):
            number = f"-{i}" if len(together) > 1 else ""
            paths.append(save(draw_scaling(family, axis), folder / f"by-{axis.name}{number}.png"))
    return paths
