"""Bytes a second of each kernel beside a copy of as many, torch's fused AdamW and chains of torch's operations."""

from __future__ import annotations

import json
import sys
from typing import Any

from bench.gpu.command import run_command
from bench.gpu.part import Findings, Setting, Table

BOUND = "the same traffic"
HEADINGS = ("kernel", "ms", "GB/s", "of a copy's", "times as fast as")
REAL = ("--gib", "4", "--rounds", "9")
REHEARSAL = ("--gib", "0.001", "--rounds", "2", "--only", "one tensor", "clipped", "pack float32")


def run(setting: Setting, limit_s: float) -> Findings:
    out = setting.scratch / "kernels.json"
    out.unlink(missing_ok=True)
    size = REHEARSAL if setting.rehearses else REAL
    options = ("--device", setting.device, "--threads", "1", "--out", str(out), *size)
    ended = run_command([sys.executable, "-m", "bench.kernels", *options], limit_s)
    if not out.exists():
        return Findings(ended.problem or "nothing was measured", output=ended.output)
    figures = json.loads(out.read_text())
    table = Table("Kernels", HEADINGS, [row_of(row) for row in figures["rows"]])
    return Findings(ended.problem, tables=[table], figures=figures, output=ended.output)


def row_of(row: dict[str, Any]) -> tuple[str, ...]:
    seconds: float = row["seconds"]
    rivals = {name: other / seconds for name, other in row["others"].items()}
    of_bound = rivals.pop(BOUND)
    return (
        row["name"],
        f"{1e3 * seconds:.3f}",
        f"{row['bytes'] / seconds / 1e9:.0f}",
        f"{of_bound:.0%}",
        ", ".join(f"{name} {ratio:.2f}" for name, ratio in rivals.items()),
    )
