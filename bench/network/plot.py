"""The step by method, one panel a link, with what the link needs for its bytes: needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes

from bench.compare.plots.look import DARK, FAINT, INK, LIGHT, STYLE, make_figure, name_rows, save, side_of
from bench.network.link import Link
from bench.network.methods import ALONE
from bench.network.rank import Setting
from bench.network.results import Row, link_s


@rc_context(STYLE)
def draw(rows: Sequence[Row], setting: Setting, parameters: int, path: Path) -> Path:
    links = list(dict.fromkeys(row.link for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    figure = make_figure(
        "A training step over slow links",
        f"GPT of {parameters / 1e6:.1f} M parameters, {setting.num_hosts} hosts of {setting.ranks_a_host} ranks on one machine. "
        "Light: what the link needs for the bytes of a step.",
        0.9 + 0.27 * len(methods),
    )
    panels = figure.subplots(1, len(links), sharey=True, squeeze=False)[0]
    for axes, link in zip(panels, links, strict=True):
        draw_link(axes, link, [row for row in rows if row.link == link], methods)
    name_rows(panels[0], [ALONE if method == ALONE else method for method in methods], methods)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, path)


def draw_link(axes: Axes, link: str, rows: Sequence[Row], methods: Sequence[str]) -> None:
    known = Link.parse(link.lower().replace(" ", "").replace("b/s,", "bit+").replace("b/s", "bit"))
    longest = max((row.step_s or 0.0 for row in rows), default=0.0)
    for row in rows:
        if row.step_s is None:
            continue
        place, side = methods.index(row.method), side_of(row.method)
        axes.barh(place, row.step_s, color=DARK[side], edgecolor=FAINT if side == "bound" else "white", height=0.74)
        axes.barh(place, link_s(row, known), color=LIGHT[side], edgecolor="white", height=0.3)
        axes.annotate(
            f"{1e3 * row.step_s:.0f}", (row.step_s, place), (4, 0), textcoords="offset points", va="center", color=INK
        )
    axes.set_xlim(0, 1.22 * longest)
    axes.set_title(link, fontsize=9.5)
    axes.set_xlabel("s a step", color=FAINT)
    axes.grid(axis="x")
