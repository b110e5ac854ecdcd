"""One step of some methods in the middle of training: what the training thread does, and what is under way meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.compare.launch import Run
from bench.compare.plots.look import ACCENT, FAINT, STYLE, choose, emphasise, make_figure
from bench.compare.setting import Setting
from bench.compare.summary import Comparison
from bench.compare.table import title_of
from bench.compare.timeline import Range, Span, Step, steady_step

MOST_METHODS = 6
LANES = ("training", "gradients", "parameters")
PHASES = {"forward": "#BBD7EA", "backward": "#7FB2D6", "step": "#F0E442"}
FLIGHTS = {"gradients": "#009E73", "parameters": "#CC79A7"}
LANE_HEIGHT = 0.8
NOTE = (
    "zeroopt's buckets are under way from their start until the wait for them ends, those of others while the backend works on "
    "them. In the forward, parameters of the step before arrive."
)


def traces_of(runs: Sequence[Run], setting: Setting) -> dict[str, list[Range]]:
    """The first trace of each method."""
    traces: dict[str, list[Range]] = {}
    for run in runs:
        if run.setting == setting and run.ranks and run.ranks[0].ranges:
            traces.setdefault(run.method, run.ranks[0].ranges)
    return traces


@rc_context(STYLE)
def draw_timelines(traces: Mapping[str, Sequence[Range]], comparison: Comparison) -> Figure:
    """One above the other, in the same time; what lies above one another overlaps."""
    chosen = choose(list(traces), MOST_METHODS)
    steps = {method: step for method in chosen if (step := steady_step(traces[method])) is not None}
    figure = make_figure(
        "One training step, and what is under way meanwhile",
        f"{title_of(comparison)}. {NOTE}",
        0.75 + 1.05 * len(steps),
    )
    all_axes = figure.subplots(len(steps), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (method, step) in zip(all_axes, steps.items(), strict=True):
        draw_step(axes, method, step)
    all_axes[-1].set_xlabel("ms since the forward began, under the profiler, on rank 0", color=FAINT)
    draw_legend(figure, waits=any(step.lane("waiting") for step in steps.values()))
    return figure


def draw_step(axes: Axes, method: str, step: Step) -> None:
    """Phases in the first lane, with the parts in which the training thread waits marked; then what is under way."""
    waits = sum(span.end_ms - span.start_ms for span in step.lane("waiting"))
    told = f", {waits:.0f} ms of it waiting" if waits >= 0.5 else ""
    emphasise(axes.set_title(f"{method}: {step.length_ms:.0f} ms{told}", loc="left", fontsize=9.5, pad=2), method)
    for span in step.spans:
        if span.lane in PHASES:
            place(axes, span, 0, LANE_HEIGHT, facecolor=PHASES[span.lane], edgecolor="white", linewidth=0.6)
    for span in step.lane("waiting"):
        place(axes, span, 0, LANE_HEIGHT, facecolor="white", edgecolor=ACCENT, hatch="//////", linewidth=0.8)
    for lane, colour in FLIGHTS.items():
        spans = step.lane(lane)
        for span, (row, rows) in zip(spans, rows_of(spans), strict=True):
            height = LANE_HEIGHT / rows
            top = LANES.index(lane) - LANE_HEIGHT / 2
            place(axes, span, top + (row + 0.5) * height, height, facecolor=colour, edgecolor="white", linewidth=0.6)
    axes.set_yticks(range(len(LANES)), LANES, fontsize=8.5)
    axes.set_ylim(len(LANES) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def place(axes: Axes, span: Span, centre: float, height: float, **look: Any) -> None:
    axes.barh(centre, span.end_ms - span.start_ms, left=span.start_ms, height=height, **look)


def rows_of(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """For each of some spans of a lane, in which row of how many it lies, so that none lies on another."""
    ends: list[float] = []
    rows = []
    for span in spans:
        free = next((row for row, end in enumerate(ends) if end <= span.start_ms), len(ends))
        ends[free : free + 1] = [span.end_ms]
        rows.append(free)
    return [(row, len(ends)) for row in rows]


def draw_legend(figure: Figure, *, waits: bool) -> None:
    names = {"forward": "forward", "backward": "backward", "step": "optimizer"}
    marks = [Patch(facecolor=colour, label=names[phase]) for phase, colour in PHASES.items()]
    if waits:
        marks.append(Patch(facecolor="white", edgecolor=ACCENT, hatch="//////", label="waits for a collective"))
    marks += [Patch(facecolor=colour, label=f"{lane} under way") for lane, colour in FLIGHTS.items()]
    figure.legend(
        handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8.5, columnspacing=1, handlelength=1.4
    )
