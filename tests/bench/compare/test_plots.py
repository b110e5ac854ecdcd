"""The pictures of a comparison say what its figures say: bars, labels, lines and spans of made-up runs."""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")


@pytest.fixture(scope="module")
def bench() -> Any:
    """Modules by their last name."""
    names = ("bandwidth", "budget", "launch", "methods", "plots", "rank", "setting", "summary", "sweep", "timeline")
    modules = ("plots.largest", "plots.look", "plots.memory", "plots.scaling", "plots.timelines", "plots.times", *names)
    return SimpleNamespace(
        **{name.split(".")[-1]: importlib.import_module(f"bench.compare.{name}") for name in modules}
    )


STAGE_1, STAGE_2, PAIRWISE = "zeroopt stage 1", "zeroopt stage 2", "zeroopt stage 2, pairwise"


def made_up_run(bench: Any, method: str, setting: Any, forward_backward_s: float, optimizer_s: float) -> Any:
    figures = bench.rank.Figures(
        wrap_s=0.5,
        forward_backward_s=[forward_backward_s, forward_backward_s + 0.02],
        optimizer_s=[optimizer_s, optimizer_s],
        cpu_s=1.0,
        sent_bytes=100,
        losses=[5.0],
        resident_bytes=10,
        device_bytes=None,
        bandwidth=bench.bandwidth.Bandwidth(optimizer=28e8, copy=4e8) if method == bench.methods.ALONE else None,
        ranges=[],
    )
    together = int(16 * setting.parameters * setting.world_size * (forward_backward_s + optimizer_s))
    return bench.launch.Run(method, setting, None, [figures] * setting.world_size, together, samples=3)


def setting_of(bench: Any, **changes: Any) -> Any:
    return replace(bench.setting.Setting(1, 64, 64, 8, 1, "float32", None, 2, 1, "cpu"), **changes)


def four_runs(bench: Any, setting: Any) -> list[Any]:
    """Steps of 1.01, 0.76, 0.91 and 0.51 seconds."""
    return [
        made_up_run(bench, bench.methods.DDP, setting, 0.8, 0.2),
        made_up_run(bench, STAGE_2, setting, 0.6, 0.15),
        made_up_run(bench, "DeepSpeed ZeRO-2", setting, 0.4, 0.5),
        made_up_run(bench, bench.methods.ALONE, setting, 0.4, 0.1),
        bench.launch.Run("fairscale OSS + ShardedDDP", setting, problem="not installed: fairscale"),
    ]


def names_of(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def texts_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def widths_of(axes: Any) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def test_times(bench: Any) -> None:
    (comparison,) = bench.summary.summarize(four_runs(bench, setting_of(bench)))
    figure = bench.times.draw_times(comparison)
    (axes,) = figure.axes
    ddp = bench.methods.DDP
    assert names_of(axes) == [bench.methods.ALONE, STAGE_2, "DeepSpeed ZeRO-2", ddp]
    widths = widths_of(axes)
    assert [sum(pair) for pair in zip(widths[::2], widths[1::2], strict=True)] == pytest.approx([510, 760, 910, 1010])
    assert widths[1::2] == pytest.approx([510 * 10 / 51, 760 * 15 / 76, 910 * 50 / 91, 1010 * 20 / 101])
    labels = texts_of(axes)
    assert labels[:4] == ["510 ms   0.50×", "760 ms   0.75×", "910 ms   0.90×", "1010 ms   1.00×"]
    levels = {line.get_label(): line.get_xdata()[0] for line in axes.lines if line.get_label() in ("limit", "DDP")}
    assert levels == pytest.approx({"limit": 1e3 * comparison.limit.step_s, "DDP": 1010})
    weights = [label.get_fontweight() for label in axes.get_yticklabels()]
    assert weights == ["normal", "bold", "normal", "normal"]


def test_times_without_ddp_or_limit(bench: Any) -> None:
    runs = [made_up_run(bench, STAGE_2, setting_of(bench), 0.04, 0.01)]
    (comparison,) = bench.summary.summarize(runs)
    (axes,) = bench.times.draw_times(comparison).axes
    assert texts_of(axes) == ["60 ms"]


def test_times_names_what_trained_wrong(bench: Any) -> None:
    (comparison,) = bench.summary.summarize(four_runs(bench, setting_of(bench)))
    rows = [replace(row, wrong="loss nan") if row.method == STAGE_2 else row for row in comparison.rows]
    (axes,) = bench.times.draw_times(replace(comparison, rows=rows)).axes
    assert f"WRONG LOSSES: {STAGE_2}" in names_of(axes)


def test_memory(bench: Any) -> None:
    (comparison,) = bench.summary.summarize(four_runs(bench, setting_of(bench)))
    (axes,) = bench.memory.draw_memory(comparison).axes
    assert names_of(axes) == [STAGE_2, "DeepSpeed ZeRO-2", bench.methods.DDP]  # the bound is no method to train by
    widths = widths_of(axes)
    assert widths[::2] == pytest.approx([10, 12, 16])  # the formula, where that much was measured
    assert [sum(pair) for pair in zip(widths[::2], widths[1::2], strict=True)] == pytest.approx(
        [12, 14.4, 16], rel=1e-3
    )
    assert [line.get_xdata()[0] for line in axes.lines] == [10, 12, 16]
    assert texts_of(axes) == ["12.0   0.75×", "14.4   0.90×", "16.0   1.00×"]


def test_choice(bench: Any) -> None:
    choose, preferred = bench.look.choose, bench.look.PREFERRED
    assert set(preferred) <= set(bench.methods.METHODS)
    assert choose(list(bench.methods.METHODS), len(preferred)) == [
        method for method in bench.methods.METHODS if method in preferred
    ]
    assert choose(["a", "b", STAGE_2, "c"], 3) == ["a", "b", STAGE_2]
    assert choose(["a"], 3) == ["a"]


def test_scaling(bench: Any) -> None:
    settings = [setting_of(bench, world_size=n, tokens=tokens) for tokens in (8, 16) for n in (4, 2)]
    comparisons = bench.summary.summarize([run for setting in settings for run in four_runs(bench, setting)])
    ranks, tokens, parameters = (
        bench.sweep.families(comparisons, bench.sweep.AXES[name]) for name in ("ranks", "tokens", "parameters")
    )
    assert [[place.value for place in family] for family in ranks] == [[2, 4], [2, 4]]
    assert [[place.value for place in family] for family in tokens] == [[8, 16], [8, 16]]
    assert parameters == []  # although positions are parameters, of which there are more with more tokens

    figure = bench.scaling.draw_scaling(ranks[0], bench.sweep.AXES["ranks"])
    speed, memory = figure.axes
    lines = {line.get_label(): line for line in speed.lines}
    assert list(lines) == [bench.methods.DDP, STAGE_2, "DeepSpeed ZeRO-2", "limit"]
    assert list(lines[STAGE_2].get_xdata()) == [2, 4]
    assert lines[STAGE_2].get_ydata() == pytest.approx([1.01 / 0.76] * 2)
    limits = [1.01 / place.comparison.limit.step_s for place in ranks[0]]
    assert lines["limit"].get_ydata() == pytest.approx(limits)
    assert [line.get_ydata()[0] for line in memory.lines] == pytest.approx([16, 12, 14.4], rel=1e-3)
    assert [label.get_text() for label in speed.get_xticklabels()] == ["2", "4"]
    (subtitle,) = (text.get_text() for text in figure.texts if "layers" in text.get_text())
    assert "ranks" not in subtitle
    assert "8 tokens a rank" in subtitle


def test_scaling_without_ddp(bench: Any) -> None:
    settings = [setting_of(bench, bucket_mb=mb) for mb in (None, 1.0, 4.0)]
    runs = [made_up_run(bench, STAGE_2, setting, 0.48, 0.01) for setting in settings]
    buckets = bench.sweep.AXES["buckets"]
    (family,) = bench.sweep.families(bench.summary.summarize(runs), buckets)
    speed, _ = bench.scaling.draw_scaling(family, buckets).axes
    (line,) = speed.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 4], pytest.approx([32, 32]))  # tokens a second


def zeroopt_trace(bench: Any) -> list[Any]:
    """Two steps of 100 ms; a bucket's gradients are awaited 20 ms after they have started, its parameters in the next forward."""
    ranges = []
    for begin in (0, 100, 200):
        wait = ("zeroopt::wait_for_gather bucket 3 (a … b)", begin + 10, begin + 15)
        ranges += [("forward", begin, begin + 30), wait]
        if begin < 200:
            ranges += [
                ("backward", begin + 30, begin + 80),
                ("zeroopt::reduce_scatter bucket 3 (a … b)", begin + 40, begin + 41),
                ("idle", begin + 55, begin + 70),
                ("zeroopt::wait_for_reduce bucket 3 (a … b)", begin + 55, begin + 60),
                ("step", begin + 80, begin + 100),
                ("zeroopt::all_gather bucket 3 (a … b)", begin + 90, begin + 91),
            ]
    return [bench.timeline.Range(name, start, end, 1) for name, start, end in sorted(ranges, key=lambda r: r[1])]


def test_steady_step_of_zeroopt(bench: Any) -> None:
    step = bench.timeline.steady_step(zeroopt_trace(bench))
    assert step.length_ms == 100
    lanes = {
        name: [(span.start_ms, span.end_ms) for span in step.lane(name)] for name in ("forward", "backward", "step")
    }
    assert lanes == {"forward": [(0, 30)], "backward": [(30, 80)], "step": [(80, 100)]}
    Span = bench.timeline.Span
    assert step.lane("gradients") == [Span("gradients", 40, 60, "3")]
    assert step.lane("parameters") == [Span("parameters", 0, 15, "3"), Span("parameters", 90, 100, "3")]
    assert step.lane("waiting") == [Span("waiting", 55, 60)]  # later, nothing is under way to wait for


def test_steady_step_is_a_typical_one(bench: Any) -> None:
    ends = (0, 50, 150, 450, 560)
    entries = [
        entry
        for begin, end in pairwise(ends)
        for entry in (("forward", begin, begin + 20, 1), ("step", end - 10, end, 1))
    ]
    step = bench.timeline.steady_step([bench.timeline.Range(*entry) for entry in entries])
    assert step.length_ms == 110
    assert step.lane("forward") == [bench.timeline.Span("forward", 0, 20)]


def test_steady_step_of_others(bench: Any) -> None:
    """With several micro-batches, and collectives on threads of their own."""
    ranges = [
        ("step", 0, 10, 1),
        ("forward", 12, 20, 1),
        ("gloo:all_gather", 13, 18, 2),
        ("backward", 20, 30, 1),
        ("forward", 30, 40, 1),
        ("backward", 40, 60, 1),
        ("c10d::allreduce_", 45, 46, 1),
        ("gloo:all_reduce", 47, 70, 3),
        ("step", 60, 72, 1),
        ("forward", 72, 80, 1),
        ("gloo:barrier", 81, 82, 2),
    ]
    step = bench.timeline.steady_step([bench.timeline.Range(*entry) for entry in ranges])
    assert step.length_ms == 60
    assert [(span.start_ms, span.end_ms) for span in step.lane("backward")] == [(8, 18), (28, 48)]
    assert [(span.start_ms, span.end_ms) for span in step.lane("gradients")] == [(35, 58)]
    assert [(span.start_ms, span.end_ms) for span in step.lane("parameters")] == [(1, 6)]
    assert bench.timeline.steady_step([]) is None


def test_idle_ranges(bench: Any) -> None:
    """Between operators of the thread that trains: others do not count, nor do moments."""
    entries = [
        ("forward", 1000, 11000, 1),
        ("aten::mm", 1000, 4000, 1),
        ("aten::add", 2000, 3000, 1),
        ("aten::mm", 4900, 5000, 1),
        ("aten::copy_", 5000, 9000, 2),
        ("autograd::engine::evaluate_function: MmBackward0", 8200, 9600, 3),
        ("aten::mm", 8200, 9500, 3),
        ("zeroopt::sum bucket 0 (a … b)", 7000, 8000, 1),
        ("zeroopt::wait_for_reduce bucket 0 (a … b)", 8000, 11000, 1),
    ]
    events = [
        SimpleNamespace(name=name, thread=thread, time_range=SimpleNamespace(start=start, end=end))
        for name, start, end, thread in entries
    ]
    ranges = bench.timeline.ranges_of(events)
    assert [(r.start_ms, r.end_ms) for r in ranges if r.name == "idle"] == [(4, 6), (8.5, 10)]  # and 0.9 ms before
    assert "aten::mm" not in {r.name for r in ranges}
    assert ranges[0] == bench.timeline.Range("forward", 0, 10, 1)


def test_timelines(bench: Any) -> None:
    traces = {name: zeroopt_trace(bench) for name in ("a", "b", bench.methods.DDP, "c", STAGE_1, STAGE_2, PAIRWISE)}
    (comparison,) = bench.summary.summarize(four_runs(bench, setting_of(bench)))
    figure = bench.timelines.draw_timelines(traces, comparison)
    assert len(figure.axes) == 6
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        f"{name}: 100 ms, 5 ms of it waiting" for name in ("a", "b", bench.methods.DDP, STAGE_1, STAGE_2, PAIRWISE)
    ]
    spans = {(patch.get_x(), patch.get_width()) for patch in figure.axes[0].patches}
    assert spans == {(0, 30), (30, 50), (80, 20), (40, 20), (0, 15), (90, 10), (55, 5)}


def test_rows_of_a_lane(bench: Any) -> None:
    spans = [bench.timeline.Span("gradients", *ends) for ends in ((0, 10), (5, 20), (10, 15), (12, 30))]
    assert bench.timelines.rows_of(spans) == [(0, 3), (1, 3), (0, 3), (2, 3)]


def test_largest(bench: Any) -> None:
    Largest = bench.budget.Largest
    ddp = Largest(bench.methods.DDP, None, 8, 20_000_000, {}, {2: 16, 64: 16, 1024: 16})
    own = Largest(STAGE_2, None, 12, 30_000_000, {}, {2: 10, 64: 4.1875, 1024: 1})
    missing = Largest("fairscale OSS + ShardedDDP", "not installed: fairscale", 0, 0, {}, {2: 16, 64: 16, 1024: 16})
    figure = bench.plots.draw_largest([ddp, missing, own], 400)
    assert "on 2 ranks" in figure.texts[1].get_text()
    bars, promises = figure.axes
    assert names_of(bars) == [STAGE_2, bench.methods.DDP]
    assert widths_of(bars) == [30, 20]
    assert texts_of(bars) == ["30.0 M   1.50×", "20.0 M   1.00×"]
    assert texts_of(promises) == ["1.60×", "3.82×", "16×", "1.00×", "1.00×", "1.00×"]

    (axes,) = bench.plots.draw_largest([own], 400).axes
    assert texts_of(axes) == ["30.0 M"]


def test_all_pictures_are_small_files(bench: Any, tmp_path: Path) -> None:
    settings = [setting_of(bench, world_size=n) for n in (2, 4)]
    runs = [run for setting in settings for run in four_runs(bench, setting)]
    runs[0].ranks = [replace(figures, ranges=zeroopt_trace(bench)) for figures in runs[0].ranks]
    refused = bench.launch.Run(STAGE_2, setting_of(bench, tokens=16), problem="failed")
    comparisons = bench.summary.summarize([*runs, refused])
    found = bench.budget.Largest(STAGE_2, None, 12, 30_000_000, {}, {2: 10, 64: 4.1875, 1024: 1})
    searches = [bench.budget.Search(settings[0], 400, [found])]
    paths = bench.plots.draw_all(comparisons, runs, searches, tmp_path)
    expected = ["time-0", "memory-0", "timeline-0", "time-1", "memory-1", "by-ranks", "largest-0"]
    assert [path.name for path in paths] == [f"{name}.png" for name in expected]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 100_000
