"""What all pictures have in common: colours that the colour-blind tell apart, titles, and the files that they become."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from bench.compare.methods import ALONE, DDP

WIDTH = 9.0  # inches
LINE = 136  # characters of the subtitle
DOTS_AN_INCH = 150  # half as many again as a README shows, for screens that have them
NUM_COLOURS = 96

INK, FAINT, ACCENT = "#222222", "#6A6A6A", "#D55E00"
DARK = {"own": "#0072B2", "peer": "#808080", "bound": "#FFFFFF"}
LIGHT = {"own": "#8CC6EC", "peer": "#CCCCCC", "bound": "#FFFFFF"}

STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.6,
}

PREFERRED = (
    DDP,
    "zeroopt stage 1",
    "zeroopt stage 2",
    "zeroopt stage 2, pairwise",
    "FSDP2, reshard_after_forward=False",
    "DeepSpeed ZeRO-2",
    "zeroopt stage 2, share_parameters",
    "ZeroRedundancyOptimizer + DDP",
)


def side_of(method: str) -> str:
    """Whose it is: "own", "peer" or "bound"."""
    if method == ALONE:
        return "bound"
    return "own" if method.startswith("zeroopt") else "peer"


def choose(methods: Sequence[str], most: int) -> list[str]:
    """As many as a picture can hold, in their order: those that most are curious about, then the first others."""
    wanted = [method for method in PREFERRED if method in methods]
    wanted += [method for method in methods if method not in wanted]
    return [method for method in methods if method in wanted[:most]]


def make_figure(title: str, subtitle: str, height: float) -> Figure:
    """With a heading at its top left; all else is laid out below it."""
    lines = textwrap.wrap(subtitle, LINE)
    heading = 0.42 + 0.16 * len(lines)
    height += heading
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, 0, 0.99, 1 - heading / height))  # type: ignore[call-arg]
    figure.text(0.012, 1 - 0.09 / height, title, va="top", fontsize=13, weight="bold")
    figure.text(0.012, 1 - 0.37 / height, "\n".join(lines), va="top", fontsize=8.5, color=FAINT)
    return figure


def name_rows(axes: Axes, methods: Sequence[str], names: Sequence[str]) -> None:
    """The first on top, own methods in bold."""
    axes.set_yticks(range(len(methods)), names)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    for method, label in zip(methods, axes.get_yticklabels(), strict=True):
        emphasise(label, method)


def emphasise(text: Text, method: str) -> None:
    if side_of(method) == "own":
        text.set_fontweight("bold")
        text.set_color(DARK["own"])


def save(figure: Figure, path: Path) -> Path:
    """As a PNG of few colours, a third as large as one of all."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=DOTS_AN_INCH, format="png")
    Image.open(drawn).convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    return path
