"""One row a method and link, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from bench.network.link import Link
from bench.network.methods import ALONE, DDP
from bench.network.rank import Setting, Window


@dataclass(frozen=True)
class Row:
    """One method on one link.

    Attributes:
        step_s: the median over windows of the slowest rank's, a step.
        sent, received: bytes a step on the busiest host's link.
        cpu_s: a step, of all ranks.
        loss: the mean over ranks, after all steps.
        problem: why there are no figures.
    """

    method: str
    link: str
    step_s: float | None = None
    sent: float | None = None
    received: float | None = None
    cpu_s: float | None = None
    loss: float | None = None
    problem: str | None = None


def row_of(method: str, link: Link, ranks: Sequence[Sequence[Window]]) -> Row:
    """Of what all ranks have measured."""
    windows = list(zip(*ranks, strict=True))
    return Row(
        method,
        str(link),
        step_s=statistics.median(max(window.seconds for window in each) for each in windows),
        sent=statistics.median(max(window.sent for window in each) for each in windows),
        received=statistics.median(max(window.received for window in each) for each in windows),
        cpu_s=statistics.median(sum(window.cpu_s for window in each) for each in windows),
        loss=statistics.fmean(window.loss for window in windows[-1]),
    )


def link_s(row: Row, link: Link) -> float:
    """What the link needs at least for a row's bytes, in both directions at once."""
    return link.seconds(max(row.sent or 0.0, row.received or 0.0))


def make_table(rows: Sequence[Row], link: Link, setting: Setting, parameters: int) -> Table:
    table = Table(
        title=f"{parameters / 1e6:.1f} M parameters, {setting.num_hosts} hosts of {setting.ranks_a_host} ranks, links of {link}",
        caption="link: what the bytes of a step take on it at least, compute: the step without communication",
        box=box.SIMPLE,
    )
    table.add_column("method", no_wrap=True)
    for heading in (
        "step\nms",
        "of DDP's",
        "link\nms",
        "of the larger of\nlink and compute",
        "MB sent\na host",
        "CPU s",
        "loss",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    by_method = {row.method: row.step_s for row in rows}
    for row in rows:
        table.add_row(row.method, *cells_of(row, link, by_method))
    return table


def cells_of(row: Row, link: Link, steps: dict[str, float | None]) -> list[str]:
    if row.step_s is None or row.sent is None or row.cpu_s is None:
        return ["failed"]
    baseline, compute = steps.get(DDP), steps.get(ALONE)
    least = link_s(row, link)
    return [
        f"{1e3 * row.step_s:.0f}",
        "" if baseline is None else f"{row.step_s / baseline:.3f}",
        f"{1e3 * least:.0f}",
        "" if compute is None else f"{row.step_s / max(least, compute):.2f}",
        f"{row.sent / 1e6:.1f}",
        f"{row.cpu_s:.2f}",
        f"{row.loss:.4f}",
    ]
