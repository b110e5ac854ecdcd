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

from bench.compare.launch import Run
from bench.compare.plots.largest import draw_largest
from bench.compare.plots.look import save
from bench.compare.plots.memory import draw_memory
from bench.compare.plots.scaling import SWEEPS, draw_scaling, families
from bench.compare.plots.timelines import draw_timelines, traces_of
from bench.compare.plots.times import draw_times
from bench.compare.summary import Comparison

__all__ = ["draw_all", "draw_largest", "draw_memory", "draw_scaling", "draw_timelines", "draw_times", "save"]


def draw_all(comparisons: Sequence[Comparison], runs: Sequence[Run], folder: Path) -> list[Path]:
    """Pictures of each setting, and curves over what differs between settings."""
    paths = []
    for i, comparison in enumerate(comparisons):
        if any(row.step_s for row in comparison.rows):
            paths.append(save(draw_times(comparison), folder / f"time-{i}.png"))
        if any(row.bytes_a_parameter for row in comparison.rows):
            paths.append(save(draw_memory(comparison), folder / f"memory-{i}.png"))
        traces = traces_of(runs, comparison.setting)
        if traces:
            paths.append(save(draw_timelines(traces, comparison), folder / f"timeline-{i}.png"))
    for sweep in SWEEPS:
        together = families(comparisons, sweep)
        for i, family in enumerate(together):
            number = f"-{i}" if len(together) > 1 else ""
            paths.append(save(draw_scaling(family, sweep), folder / f"by-{sweep.name}{number}.png"))
    return paths
