"""The rows of a comparison as text, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from bench.compare.budget import MANY_RANKS, Largest, Search
from bench.compare.summary import Comparison, Row, Spread
from bench.compare.sweep import AXES, Axis, Place, families, short

HEADINGS = (
    "step ms",
    "forward + backward",
    "optimizer",
    "of DDP's",
    "of the limit",
    "tokens/s",
    "CPU s a step",
    "sent MB",
    "PSS MB",
    "RSS MB",
    "bytes/param",
    "formula",
    "wrap s",
    "loss",
)
CAPTION = (
    "times: median (quartiles) over the steps of all rounds. sent: over TCP, by a rank in a step. PSS: the most that ranks held "
    "together, by their number, above a rehearsal; RSS: of the largest rank, shared pages in full. formula: without activations "
    "and buckets. loss: in the last step."
)


def title_of(comparison: Comparison) -> str:
    setting = comparison.setting
    buckets = "" if setting.bucket_mb is None else f", buckets of {setting.bucket_mb:g} MiB"
    micros = "" if setting.accumulation == 1 else f" in {setting.accumulation} micro-batches"
    return (
        f"{setting.parameters / 1e6:.1f} M parameters ({setting.layers} layers of width {setting.width}), {setting.world_size} "
        f"ranks, {setting.tokens * setting.accumulation} tokens a rank and step{micros}, {setting.precision}, "
        f"{setting.threads} thread(s) a rank, {setting.device}{buckets}"
    )


def cells_of(comparison: Comparison) -> list[list[str]]:
    """The name of each method, and what stands below `HEADINGS`; a row without figures says why in its name."""
    baseline, limit = comparison.baseline, comparison.limit
    cells = [] if limit is None else [["(limit)", f"{1e3 * limit.step_s:.1f}", *limit_cells(comparison, baseline)]]
    for row in comparison.rows:
        if row.problem is not None:
            cells.append([f"{row.method}: {row.problem}"])
            continue
        name = row.method if row.wrong is None else f"WRONG: {row.method} ({row.wrong})"
        cells.append([name, *figures_of(row, baseline, comparison)])
    return cells


def limit_cells(comparison: Comparison, baseline: Row | None) -> list[str]:
    limit = comparison.limit
    assert limit is not None
    parts = [f"{1e3 * limit.forward_backward_s:.1f}", f"{1e3 * limit.optimizer_s:.1f}"]
    return [*parts, ratio(limit.step_s, step_of(baseline)), *[""] * (len(HEADINGS) - 4)]


def figures_of(row: Row, baseline: Row | None, comparison: Comparison) -> list[str]:
    limit = comparison.limit
    step = step_of(row)
    return [
        milliseconds(row.step_s, spread_too=True),
        milliseconds(row.forward_backward_s),
        milliseconds(row.optimizer_s),
        ratio(step, step_of(baseline)),
        ratio(step, None if limit is None else limit.step_s),
        number(row.tokens_a_second, 0),
        number(row.cpu_s, 3),
        number(row.sent_bytes, 2, 1e6),
        number(row.pss_bytes if row.device_bytes is None else row.device_bytes, 1, 1e6),
        number(row.resident_bytes, 1, 1e6),
        number(row.bytes_a_parameter, 2),
        number(row.formula, 2),
        number(row.wrap_s, 2),
        number(row.losses[-1], 4),
    ]


def milliseconds(spread: Spread | None, *, spread_too: bool = False) -> str:
    if spread is None:
        return ""
    quartiles = f" ({1e3 * spread.low:.1f}–{1e3 * spread.high:.1f})" if spread_too else ""
    return f"{1e3 * spread.median:.1f}{quartiles}"


def step_of(row: Row | None) -> float | None:
    return None if row is None else row.median_s


def ratio(value: float | None, to: float | None) -> str:
    return "" if value is None or not to else f"{value / to:.2f}"


def number(value: float | None, digits: int, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def make_table(comparison: Comparison) -> Table:
    table = Table(title=title_of(comparison), caption=CAPTION, box=box.SIMPLE)
    table.add_column("method", min_width=max(len(row.method) for row in comparison.rows))
    for heading in HEADINGS:
        table.add_column(heading.replace(" + ", " +\n"), justify="right", no_wrap=True)
    for name, *cells in cells_of(comparison):
        table.add_row(name, *cells)
    return table


def largest_title(search: Search) -> str:
    setting = search.setting
    return (
        f"The largest model in {search.budget_mb:g} MB a rank: {setting.world_size} ranks, layers of width {setting.width}, "
        f"{setting.tokens} tokens, {setting.precision}, {setting.device}"
    )


LARGEST_HEADINGS = (
    "layers",
    "M parameters",
    "times DDP's",
    "by formula",
    *(f"at {n} ranks, by formula" for n in MANY_RANKS),
)


def largest_cells(search: Search) -> list[list[str]]:
    """The name of each method, and what stands below `LARGEST_HEADINGS`."""
    return [largest_row(largest, search.baseline) for largest in search.found]


def largest_row(largest: Largest, baseline: Largest | None) -> list[str]:
    if largest.problem is not None:
        return [f"{largest.method}: {largest.problem}"]
    times = [ratio(baseline.formula[n], formula) for n, formula in largest.formula.items()] if baseline else []
    measured = ratio(largest.parameters, baseline.parameters if baseline else None)
    return [largest.method, str(largest.layers), f"{largest.parameters / 1e6:.1f}", measured, *times]


def largest_table(search: Search) -> Table:
    table = Table(title=largest_title(search), box=box.SIMPLE)
    table.add_column("method")
    for heading in LARGEST_HEADINGS:
        table.add_column(heading.replace(", ", "\n"), justify="right", no_wrap=True)
    for name, *cells in largest_cells(search):
        table.add_row(name, *cells)
    return table


def make_markdown(comparisons: Sequence[Comparison], searches: Sequence[Search], facts: Sequence[str]) -> str:
    """All of them under headings of their own; first what ran on what, one fact a line."""
    lines = ["# Comparison", "", *[f"- {fact}" for fact in facts], ""]
    for axis in AXES.values():
        for family in families(comparisons, axis):
            lines += sweep_lines(family, axis)
    for comparison in comparisons:
        lines += [f"## {title_of(comparison)}", "", *markdown_rows(["method", *HEADINGS], cells_of(comparison)), ""]
    if comparisons:
        lines += [CAPTION[0].upper() + CAPTION[1:], ""]
    for search in searches:
        headings = ["method", *LARGEST_HEADINGS]
        lines += [f"## {largest_title(search)}", "", *markdown_rows(headings, largest_cells(search)), ""]
    return "\n".join(lines)


def sweep_lines(family: Sequence[Place], axis: Axis) -> list[str]:
    """One column for each comparison: times beside DDP's, and memory."""
    headings = ["method", *(short(place.value) for place in family)]
    rows = [
        [method, *(brief(place.comparison, method) for place in family)]
        for method in dict.fromkeys(row.method for place in family for row in place.comparison.rows)
    ]
    explained = f"{what_is_common(family)}: milliseconds a step (of DDP's), bytes a parameter."
    return [f"## By {axis.title}", "", explained, "", *markdown_rows(headings, rows), ""]


def what_is_common(family: Sequence[Place]) -> str:
    """The parts of the title that are the same for all."""
    titles = [title_of(place.comparison).split(", ") for place in family]
    return ", ".join(part for part in titles[0] if all(part in title for title in titles))


def brief(comparison: Comparison, method: str) -> str:
    row = comparison.row(method)
    if row is None or row.problem is not None:
        return ""
    step = f"{milliseconds(row.step_s)} ({ratio(step_of(row), step_of(comparison.baseline))})"
    return f"{'WRONG ' if row.wrong else ''}{step}, {number(row.bytes_a_parameter, 1)}"


def markdown_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return ["| " + " | ".join([*cells, *[""] * (len(headings) - len(cells))]) + " |" for cells in lines]
