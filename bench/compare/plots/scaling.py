"""Speed and memory over what a sweep varies: one line a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from bench.compare.methods import ALONE, DDP
from bench.compare.plots.look import ACCENT, FAINT, INK, STYLE, choose, make_figure, side_of
from bench.compare.sweep import Axis, Place, short
from bench.compare.table import step_of, what_is_common

MOST_METHODS = 8
COLD = ("#0072B2", "#56B4E9", "#009E73", "#1B2A6B", "#66C2A5", "#7F7FFF")  # own methods, with full lines
WARM = ("#E69F00", "#CC79A7", "#8C510A", "#999999", "#B2182B", "#C2A5CF")  # all others, with broken ones
MARKS = "osD^vPX*"


@rc_context(STYLE)
def draw_scaling(family: Sequence[Place], axis: Axis) -> Figure:
    """Relative to DDP in the same setting where it has run, else tokens a second."""
    present = dict.fromkeys(row.method for place in family for row in place.comparison.rows if row.problem is None)
    methods = choose([method for method in present if method != ALONE], MOST_METHODS)
    figure = make_figure(f"Speed and memory by {axis.title}", what_is_common(family), 4.6)
    speed, memory = figure.subplots(1, 2)
    draw_speeds(speed, family, methods)
    draw_bytes(memory, family, methods)
    for axes in (speed, memory):
        mark_places(axes, axis, [place.value for place in family])
    handles, labels = speed.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8.5, handlelength=3)
    for text in legend.get_texts():
        text.set_fontweight("bold" if side_of(text.get_text()) == "own" else "normal")
    return figure


def look_of(methods: Sequence[str], method: str) -> dict[str, Any]:
    """Of a method's line and marks."""
    look = {"marker": MARKS[methods.index(method) % len(MARKS)], "markersize": 5, "linewidth": 1.8}
    if method == DDP:
        return look | {"color": INK, "linestyle": ":"}
    own = side_of(method) == "own"
    alike = [other for other in methods if other != DDP and (side_of(other) == "own") == own]
    colours = COLD if own else WARM
    return look | {"color": colours[alike.index(method) % len(colours)], "linestyle": "-" if own else "--"}


def draw_speeds(axes: Axes, family: Sequence[Place], methods: Sequence[str]) -> None:
    relative = all(step_of(place.comparison.baseline) for place in family)

    def speed(place: Place, step_s: float) -> float:
        baseline_s = step_of(place.comparison.baseline)
        return (baseline_s if relative and baseline_s else place.comparison.setting.tokens_a_step) / step_s

    for method in methods:
        rows = [(place, row.step_s) for place in family if (row := place.comparison.row(method)) is not None]
        line = [(place.value, speed(place, step_s.median)) for place, step_s in rows if step_s is not None]
        draw_line(axes, line, label=method, **look_of(methods, method))
    limits = [(place, place.comparison.limit) for place in family]
    line = [(place.value, speed(place, limit.step_s)) for place, limit in limits if limit is not None]
    if line:
        draw_line(axes, line, label="limit", color=ACCENT, linewidth=1.2)
    axes.set_title("speed, times DDP's" if relative else "tokens a second, all ranks", fontsize=10)


def draw_bytes(axes: Axes, family: Sequence[Place], methods: Sequence[str]) -> None:
    for method in methods:
        rows = [(place.value, row) for place in family if (row := place.comparison.row(method)) is not None]
        line = [(value, size) for value, row in rows if (size := row.bytes_a_parameter) is not None]
        draw_line(axes, line, **look_of(methods, method))
    axes.set_title("peak bytes a parameter and rank", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def draw_line(axes: Axes, line: Sequence[tuple[float, float]], **look: Any) -> None:
    axes.plot([x for x, _ in line], [y for _, y in line], **look)


def mark_places(axes: Axes, axis: Axis, values: Sequence[float]) -> None:
    """All sweeps go up by factors."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_major_formatter(FixedFormatter([short(value) for value in values]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(axis.title, color=FAINT)
    axes.grid()
