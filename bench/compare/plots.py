"""The comparison as pictures: needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.compare.launch import Run
from bench.compare.setting import Setting
from bench.compare.summary import Comparison, Row
from bench.compare.table import title_of
from bench.compare.timeline import Range

AXES: dict[str, Callable[[Setting], float]] = {
    "parameters": lambda setting: setting.parameters,
    "ranks": lambda setting: setting.world_size,
    "tokens a rank and step": lambda setting: setting.tokens * setting.accumulation,
    "MiB of a bucket": lambda setting: setting.bucket_mb or 0,
}


def draw_all(comparisons: Sequence[Comparison], runs: Sequence[Run], folder: Path) -> list[Path]:
    """Pictures of each setting, and curves over what differs between settings."""
    paths = []
    for i, comparison in enumerate(comparisons):
        shown = [row for row in comparison.rows if row.problem is None]
        if not shown:
            continue
        paths.append(save(draw_times(comparison, shown), folder / f"time-{i}.png"))
        paths.append(save(draw_memory(comparison, shown), folder / f"memory-{i}.png"))
        traces = traces_of(runs, comparison.setting)
        if traces:
            paths.append(save(draw_timelines(traces), folder / f"timeline-{i}.png"))
    for name, axis in AXES.items():
        if len({axis(comparison.setting) for comparison in comparisons}) > 1:
            paths.append(save(draw_scaling(comparisons, name, axis), folder / f"by-{name.replace(' ', '-')}.png"))
    return paths


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def rows_figure(comparison: Comparison, rows: Sequence[Row]) -> tuple[Figure, Axes, list[str]]:
    figure = Figure(figsize=(11, 1.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title_of(comparison), fontsize=8)
    axes.invert_yaxis()
    return figure, axes, [row.method if row.wrong is None else f"WRONG: {row.method}" for row in rows]


def draw_times(comparison: Comparison, rows: Sequence[Row]) -> Figure:
    timed = [row for row in rows if row.forward_backward_s and row.optimizer_s and row.step_s]
    figure, axes, names = rows_figure(comparison, timed)
    forward_backward = [1e3 * row.forward_backward_s.median for row in timed if row.forward_backward_s]
    optimizer = [1e3 * row.optimizer_s.median for row in timed if row.optimizer_s]
    axes.barh(names, forward_backward, label="forward + backward")
    axes.barh(names, optimizer, left=forward_backward, label="optimizer")
    ends = [sum(pair) for pair in zip(forward_backward, optimizer, strict=True)]
    quartiles = [
        [max(0, end - 1e3 * row.step_s.low), max(0, 1e3 * row.step_s.high - end)]
        for end, row in zip(ends, timed, strict=True)
        if row.step_s
    ]
    axes.errorbar(ends, names, xerr=list(zip(*quartiles, strict=True)), fmt="none", color="black", capsize=2)
    if comparison.limit is not None:
        axes.axvline(1e3 * comparison.limit.step_s, color="black", linestyle="--", label="limit")
    axes.set_xlabel("ms a step")
    axes.legend()
    return figure


def draw_memory(comparison: Comparison, rows: Sequence[Row]) -> Figure:
    figure, axes, names = rows_figure(comparison, rows)
    axes.barh(names, [row.bytes_a_parameter or 0 for row in rows], label="measured")
    axes.plot(
        [row.formula or 0 for row in rows], names, "k|", markersize=14, label="formula, without activations and buckets"
    )
    axes.set_xlabel("bytes a parameter and rank, at the peak")
    axes.legend()
    return figure


def draw_scaling(comparisons: Sequence[Comparison], name: str, axis: Callable[[Setting], float]) -> Figure:
    figure = Figure(figsize=(13, 5), layout="constrained")
    throughput, memory = figure.subplots(1, 2)
    for method in dict.fromkeys(row.method for comparison in comparisons for row in comparison.rows):
        rows = [
            row for comparison in comparisons for row in comparison.rows if row.method == method and not row.problem
        ]
        rows.sort(key=lambda row: axis(row.setting))
        places = [axis(row.setting) for row in rows]
        if places:
            throughput.plot(places, [row.tokens_a_second or 0 for row in rows], marker="o", label=method)
            memory.plot(places, [row.bytes_a_parameter or 0 for row in rows], marker="o", label=method)
    for axes, title in (
        (throughput, "tokens a second, all ranks"),
        (memory, "bytes a parameter and rank, at the peak"),
    ):
        axes.set_title(title)
        axes.set_xlabel(name)
        axes.set_ylim(bottom=0)
    figure.legend(*throughput.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure


def traces_of(runs: Sequence[Run], setting: Setting) -> dict[str, list[Range]]:
    """The first trace of each method."""
    traces: dict[str, list[Range]] = {}
    for run in runs:
        if run.setting == setting and run.ranks and run.ranks[0].ranges:
            traces.setdefault(run.method, run.ranks[0].ranges)
    return traces


LANES = ("forward", "backward", "step", "collectives", "gradients under way", "parameters under way")
FLIGHTS = (("reduce_scatter", "wait_for_reduce", LANES[4]), ("all_gather", "wait_for_gather", LANES[5]))


def draw_timelines(traces: dict[str, list[Range]]) -> Figure:
    """One above the other, in the same time; what lies above one another overlaps."""
    figure = Figure(figsize=(12, 1.8 * len(traces)), layout="constrained")
    all_axes = figure.subplots(len(traces), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (method, ranges) in zip(all_axes, traces.items(), strict=True):
        for lane, start, end in spans(ranges):
            place = LANES.index(lane)
            axes.barh(place, end - start, left=start, height=0.8, color=f"C{place}", alpha=0.6)
        axes.set_yticks(range(len(LANES)), LANES, fontsize=6)
        axes.invert_yaxis()
        axes.set_title(method, fontsize=8)
    all_axes[-1].set_xlabel("ms")
    return figure


def spans(ranges: Sequence[Range]) -> Iterator[tuple[str, float, float]]:
    """Lane, start and end of each bar."""
    for r in ranges:
        if r.name in LANES:
            yield r.name, r.start_ms, r.end_ms
        elif not r.name.startswith("zeroopt::"):
            yield "collectives", r.start_ms, r.end_ms
    for phase, wait, lane in FLIGHTS:
        for start, end in flights(ranges, phase, wait):
            yield lane, start, end


def flights(ranges: Sequence[Range], phase: str, wait: str) -> Iterator[tuple[float, float]]:
    """From where a bucket starts to travel to where the wait for it ends."""
    for i, r in enumerate(ranges):
        if r.name.startswith(f"zeroopt::{phase} "):
            bucket = r.name.removeprefix(f"zeroopt::{phase} ")
            arrival = next((other for other in ranges[i:] if other.name == f"zeroopt::{wait} {bucket}"), None)
            if arrival is not None:
                yield r.start_ms, arrival.end_ms
