"""The parts that train a GPT, and what came of them as tables."""

from __future__ import annotations

import json
import statistics
import sys
from functools import partial
from typing import Any

from bench.gpu.command import run_command
from bench.gpu.part import Findings, Setting, Table

TIMES = ("method", "step ms", "of DDP's", "optimizer ms", "host ms", "launches", "waits", "copies", "last loss")
MEMORY = ("method", "held, B a parameter", "by formula", "peak MB", "by the planner")
Result = dict[str, Any]


def of_shape(shape: str, *methods: str) -> partial[Findings]:
    """Runs a shape of `bench.gpu.training_step` on one GPU; all methods unless some are named."""
    return partial(run, shape, methods, all_gpus=False)


def on_all_gpus(shape: str) -> partial[Findings]:
    return partial(run, shape, (), all_gpus=True)


def run(shape: str, methods: tuple[str, ...], setting: Setting, limit_s: float, *, all_gpus: bool) -> Findings:
    out = setting.scratch / "steps.json"
    out.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "bench.gpu.training_step", "--device", setting.device, "--out", str(out)),
        *("--shape", "tiny" if setting.rehearses else shape, "--ranks", str(setting.num_devices if all_gpus else 1)),
        *(["--methods", *methods] if methods else []),
    ]
    ended = run_command(command, limit_s)
    if not out.exists():
        return Findings(ended.problem or "nothing was measured", output=ended.output)
    report = json.loads(out.read_text())
    results: dict[str, Result] = report["results"]
    problems = [f"{name}: {result['problem']}" for name, result in results.items() if "problem" in result]
    measured = {name: result for name, result in results.items() if "problem" not in result}
    return Findings(
        "; ".join(problems) or ended.problem,
        notes=[f"{report['parameters'] / 1e6:.1f} M parameters, {report['ranks']} ranks. Times are medians."],
        tables=[*time_tables(measured, measured.get(report["baseline"])), *memory_tables(measured, report)],
        figures=report,
        output=ended.output,
    )


def time_tables(measured: dict[str, Result], baseline: Result | None) -> list[Table]:
    """Times and calls, and where torch makes the host wait, if it does."""
    rows = [time_row(name, result, baseline) for name, result in measured.items()]
    waits = [
        (name, place, str(times))
        for name, result in measured.items()
        if result["calls"]
        for place, times in result["calls"]["wait_places"].items()
    ]
    where = [Table("Where the host waits", ("method", "place", "times a step"), waits)] if waits else []
    return [Table("Time", TIMES, rows), *where]


def time_row(name: str, result: Result, baseline: Result | None) -> tuple[str, ...]:
    step_s = statistics.median(result["step_s"])
    calls = result["calls"]
    return (
        name,
        f"{1e3 * step_s:.2f}",
        f"{step_s / statistics.median(baseline['step_s']):.2f}" if baseline else "",
        f"{1e3 * statistics.median(result['optimizer_s']):.2f}",
        f"{1e3 * statistics.median(result['host_s']):.2f}",
        *([f"{calls[kind]:g}" for kind in ("launches", "waits", "copies")] if calls else ["", "", ""]),
        f"{result['losses'][-1]:.4f}",
    )


def memory_tables(measured: dict[str, Result], report: Result) -> list[Table]:
    """Of a device; nothing in a rehearsal."""
    rows = [memory_row(name, result, report) for name, result in measured.items() if result["peak_bytes"]]
    return [Table("Memory", MEMORY, rows)] if rows else []


def memory_row(name: str, result: Result, report: dict[str, Any]) -> tuple[str, ...]:
    parameters = report["parameters"]
    planned = result["planned_bytes"]
    return (
        name,
        f"{result['held_bytes'] / parameters:.2f}",
        f"{result['formula_bytes'] / parameters:.2f}",
        f"{result['peak_bytes'] / 1e6:.0f}",
        f"{planned / 1e6:.0f}" if planned else "",
    )
