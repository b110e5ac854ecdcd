"""What needs two GPUs or more: how much of the communication is hidden behind backward, beside every other way."""

from __future__ import annotations

import sys

from bench.gpu.command import run_command
from bench.gpu.part import Findings, Setting

METHODS = ("DDP, bucket views, fused AdamW", "zeroopt stage 1", "zeroopt stage 2", "FSDP2", "no communication")


def run(setting: Setting, limit_s: float) -> Findings:
    """`bench.compare`'s report, with the bound that no method can beat."""
    out = setting.scratch / "compare" / "results.json"
    command = [
        *(sys.executable, "-m", "bench.compare", "--device", "cuda", "--world-sizes", str(setting.num_devices)),
        *("--model", "gpt-320m", "--tokens", "1024", "--precision", "bfloat16", "--rounds", "1"),
        *("--methods", *METHODS, "--out", str(out)),
    ]
    ended = run_command(command, limit_s)
    report = out.with_name("report.md")
    notes = [report.read_text()] if report.exists() else []
    return Findings(ended.problem, notes=notes, output=ended.output)
