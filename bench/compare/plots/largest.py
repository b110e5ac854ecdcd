"""The largest model that each method trains in so many bytes a rank."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.compare.budget import Largest
from bench.compare.methods import ALONE, DDP
from bench.compare.plots.look import DARK, FAINT, STYLE, emphasise, make_figure, name_rows, side_of


@rc_context(STYLE)
def draw_largest(found: Sequence[Largest], budget_mb: float) -> Figure:
    """Parameters as bars, the largest on top; beside them, what the formula says of this and of larger numbers of ranks.

    Both as multiples of DDP's where DDP is among them and can train anything at all. What could not be found out is left out.
    """
    trained = [entry for entry in found if entry.problem is None and entry.method != ALONE]
    trained.sort(key=lambda entry: -entry.parameters)
    baseline = next((entry for entry in trained if entry.method == DDP and entry.parameters), None)
    ranks = "".join(f" on {next(iter(entry.formula))} ranks" for entry in trained[:1])
    multiples = "" if baseline is None else "; ×: as many times as with DDP"
    title = f"The largest model that trains in {budget_mb:g} MB a rank"
    figure = make_figure(
        title, f"found by training models of different size{ranks}{multiples}", 0.9 + 0.27 * len(trained)
    )
    if baseline is None:
        draw_bars(figure.subplots(), trained, None)
        return figure
    bars, promises = figure.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
    draw_bars(bars, trained, baseline)
    draw_promises(promises, trained, baseline)
    return figure


def draw_bars(axes: Axes, trained: Sequence[Largest], baseline: Largest | None) -> None:
    methods = [entry.method for entry in trained]
    name_rows(axes, methods, methods)
    for place, entry in enumerate(trained):
        millions = entry.parameters / 1e6
        axes.barh(place, millions, color=DARK[side_of(entry.method)], height=0.74)
        label = axes.annotate(
            f"{millions:.1f} M{times(entry, baseline)}",
            (millions, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
        emphasise(label, entry.method)
    axes.set_xlim(0, 1.35 * max((entry.parameters / 1e6 for entry in trained), default=1))
    axes.set_xlabel("M parameters", color=FAINT)
    axes.grid(axis="x")


def times(entry: Largest, baseline: Largest | None) -> str:
    return "" if baseline is None else f"   {entry.parameters / baseline.parameters:.2f}×"


def draw_promises(axes: Axes, trained: Sequence[Largest], baseline: Largest) -> None:
    """A column of text for each number of ranks."""
    axes.set_title("by the formula, on … ranks", fontsize=9.5)
    axes.set_xlim(-0.5, len(baseline.formula) - 0.5)
    axes.set_xticks(range(len(baseline.formula)), [str(ranks) for ranks in baseline.formula])
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False, labelleft=False)
    axes.spines[:].set_visible(False)
    for place, entry in enumerate(trained):
        for column, (ranks, size) in enumerate(entry.formula.items()):
            ratio = baseline.formula[ranks] / size
            text = f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"
            emphasise(axes.text(column, place, text, ha="center", va="center"), entry.method)
