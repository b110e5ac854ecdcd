"""The median step of each method in its two phases, the fastest on top."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch

from bench.compare.methods import DDP
from bench.compare.plots.look import ACCENT, DARK, FAINT, INK, LIGHT, STYLE, emphasise, make_figure, name_rows, side_of
from bench.compare.summary import Comparison, Row
from bench.compare.table import title_of


@dataclass(frozen=True)
class Bar:
    """Milliseconds.

    Attributes:
        optimizer: the part of the step that is the optimizer's, so that both phases together are the median step, which the sum
            of their own medians need not be.
    """

    method: str
    name: str
    step: float
    optimizer: float
    low: float
    high: float


def bars_of(comparison: Comparison) -> list[Bar]:
    return sorted(filter(None, map(bar_of, comparison.rows)), key=lambda bar: bar.step)


def bar_of(row: Row) -> Bar | None:
    if row.step_s is None or row.forward_backward_s is None or row.optimizer_s is None:
        return None
    step = 1e3 * row.step_s.median
    optimizer = step * row.optimizer_s.median / (row.forward_backward_s.median + row.optimizer_s.median)
    name = row.method if row.wrong is None else f"WRONG LOSSES: {row.method}"
    return Bar(row.method, name, step, optimizer, 1e3 * row.step_s.low, 1e3 * row.step_s.high)


@rc_context(STYLE)
def draw_times(comparison: Comparison) -> Figure:
    bars = bars_of(comparison)
    figure = make_figure("Time of a training step", title_of(comparison), 1.25 + 0.27 * len(bars))
    axes = figure.subplots()
    methods = [bar.method for bar in bars]
    name_rows(axes, methods, [bar.name for bar in bars])
    baseline = next((bar.step for bar in bars if bar.method == DDP), None)
    for place, bar in enumerate(bars):
        draw_bar(axes, place, bar, baseline)
    limit = None if comparison.limit is None else 1e3 * comparison.limit.step_s
    draw_levels(axes, {"limit": limit, "DDP": baseline})
    axes.set_xlim(0, 1.2 * max(bar.high for bar in bars))
    axes.set_xlabel("ms a step, the median; whiskers: quartiles; ×: of DDP's", color=FAINT)
    axes.grid(axis="x")
    draw_legend(figure)
    return figure


def draw_bar(axes: Axes, place: int, bar: Bar, baseline: float | None) -> None:
    side = side_of(bar.method)
    edge = FAINT if side == "bound" else "white"
    split = bar.step - bar.optimizer
    axes.barh(place, split, color=DARK[side], edgecolor=edge, height=0.74)
    axes.barh(place, bar.optimizer, left=split, color=LIGHT[side], edgecolor=edge, height=0.74)
    whiskers = [[max(0, bar.step - bar.low)], [max(0, bar.high - bar.step)]]
    axes.errorbar([bar.step], [place], xerr=whiskers, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    ratio = "" if baseline is None else f"   {bar.step / baseline:.2f}×"
    label = axes.annotate(
        f"{bar.step:.0f} ms{ratio}" if bar.step >= 100 else f"{bar.step:.3g} ms{ratio}",
        (bar.high, place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )
    emphasise(label, bar.method)


def draw_levels(axes: Axes, levels: dict[str, float | None]) -> None:
    """Lines through all bars, named above them: the lower one to its left, the higher one to its right."""
    known = sorted((level, name) for name, level in levels.items() if level is not None)
    for i, (level, name) in enumerate(known):
        colour, style = (ACCENT, "--") if name == "limit" else (INK, ":")
        axes.axvline(level, color=colour, linestyle=style, linewidth=1.4, label=name)
        axes.annotate(
            f"{name} {level:.0f} ms" if level >= 100 else f"{name} {level:.3g} ms",
            (level, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3 if i else -3, 3),
            textcoords="offset points",
            ha="left" if i else "right",
            color=colour,
        )


def draw_legend(figure: Figure) -> None:
    """Each phase in both colours, of own methods and of others."""
    pairs: list[Any] = [(Patch(facecolor=shade["own"]), Patch(facecolor=shade["peer"])) for shade in (DARK, LIGHT)]
    figure.legend(
        pairs,
        ["forward + backward", "optimizer"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower center",
        ncols=2,
        handlelength=3,
    )
