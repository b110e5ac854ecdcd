"""Predictions as pictures: the step over the number of GPUs, and over the size of a bucket. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench.compare.plots.look import FAINT, STYLE, make_figure, save

COLOURS = {
    "DDP": "#808080",
    "FSDP2": "#B58900",
    "ZeRO-1, flat ring": "#8CC6EC",
    "ZeRO-2, flat ring": "#0072B2",
    "ZeRO-2, two levels": "#009E73",
    "ZeRO-2, three levels": "#D55E00",
}
SUBTITLE = (
    "A prediction by the simulator, not a measurement: servers of 8 H100s with 400 Gb/s each, bfloat16, 8,192 tokens a GPU. "
    "1 is the step's arithmetic alone."
)


@rc_context(STYLE)
def draw_by_ranks(rows: Sequence[Any], path: Path) -> Path:
    """With the smallest buckets that are among the rows."""
    bucket_mb = min(row.bucket_mb for row in rows)
    chosen = [row for row in rows if row.bucket_mb == bucket_mb]
    figure = make_figure(f"A step on more and more GPUs, buckets of {bucket_mb} MiB", SUBTITLE, 2.9)
    draw_panels(figure, chosen, "gpus", "GPUs")
    return save(figure, path)


@rc_context(STYLE)
def draw_by_bucket(rows: Sequence[Any], path: Path) -> Path:
    """On the most GPUs that are among the rows."""
    gpus = max(row.gpus for row in rows)
    chosen = [row for row in rows if row.gpus == gpus and row.method != "DDP"]
    figure = make_figure(f"A step on {gpus:,} GPUs with larger and larger buckets", SUBTITLE, 2.9)
    draw_panels(figure, chosen, "bucket_mb", "MiB of a bucket")
    return save(figure, path)


def draw_panels(figure: Figure, rows: Sequence[Any], axis: str, label: str) -> None:
    models = list(dict.fromkeys(row.model for row in rows))
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        draw_model(axes, [row for row in rows if row.model == model], axis)
        axes.set_title(model, fontsize=9.5)
        axes.set_xlabel(label, color=FAINT)
    panels[0].set_ylabel("of the arithmetic's time", color=FAINT)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3)


def draw_model(axes: Axes, rows: Sequence[Any], axis: str) -> None:
    for method, colour in COLOURS.items():
        points = sorted(
            (getattr(row, axis), row.step.step_s / row.step.compute_s) for row in rows if row.method == method
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=method)
    axes.set_xscale("log")
    axes.set_yscale("log")
    places = sorted({getattr(row, axis) for row in rows})
    axes.set_xticks(places, [f"{place:,}" for place in places], rotation=30, fontsize=7.5)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y")
