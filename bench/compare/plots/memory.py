"""What each method holds at its peak, the least on top, and what it should hold."""

from __future__ import annotations

from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.compare.methods import ALONE, DDP
from bench.compare.plots.look import ACCENT, DARK, FAINT, LIGHT, STYLE, emphasise, make_figure, name_rows, side_of
from bench.compare.summary import Comparison
from bench.compare.table import title_of


@rc_context(STYLE)
def draw_memory(comparison: Comparison) -> Figure:
    """Up to the formula in a dark shade, and what is above it, activations and buckets, in a light one."""
    held = {row.method: row.bytes_a_parameter for row in comparison.rows if row.method != ALONE}
    measured = {method: size for method, size in held.items() if size is not None}
    methods = sorted(measured, key=measured.__getitem__)
    formula = {row.method: row.formula for row in comparison.rows}
    figure = make_figure("Peak memory of a rank", title_of(comparison), 1.2 + 0.27 * len(methods))
    axes = figure.subplots()
    name_rows(axes, methods, methods)
    for place, method in enumerate(methods):
        draw_bar(axes, place, method, measured[method], formula[method], measured.get(DDP))
    axes.set_xlim(0, 1.2 * max(measured.values()))
    axes.set_xlabel("bytes a parameter and rank; ×: of DDP's with bucket views", color=FAINT)
    axes.grid(axis="x")
    draw_legend(figure)
    return figure


def draw_bar(
    axes: Axes, place: int, method: str, measured: float, formula: float | None, baseline: float | None
) -> None:
    side = side_of(method)
    expected = min(measured, formula or 0)
    axes.barh(place, expected, color=DARK[side], height=0.74)
    axes.barh(place, measured - expected, left=expected, color=LIGHT[side], height=0.74)
    if formula is not None:
        axes.plot([formula, formula], [place - 0.45, place + 0.45], color=ACCENT, linewidth=2.5, solid_capstyle="butt")
    ratio = "" if baseline is None else f"   {measured / baseline:.2f}×"
    label = axes.annotate(
        f"{measured:.1f}{ratio}", (measured, place), xytext=(6, 0), textcoords="offset points", va="center"
    )
    emphasise(label, method)


def draw_legend(figure: Figure) -> None:
    marks: list[Any] = [
        Line2D([], [], color=ACCENT, linewidth=2.5),
        (Patch(facecolor=LIGHT["own"]), Patch(facecolor=LIGHT["peer"])),
    ]
    figure.legend(
        marks,
        ["formula: parameters, gradients, optimizer state", "above it: activations, buckets, …"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower center",
        ncols=2,
    )
