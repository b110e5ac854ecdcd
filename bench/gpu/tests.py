"""The tests that are marked `cuda`: kernels against the CPU's, and whole trainings."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from bench.gpu.command import ROOT, run_command
from bench.gpu.part import Findings, Setting, Table
from bench.gpu.record import VARIABLE, Outcome, outcomes_in

TESTS = ROOT / "tests"
KERNELS = TESTS / "csrc" / "cuda"
MAX_PROCESSES = 4  # that use the GPU beside each other
SHOWN = 20


def run_kernels(setting: Setting, limit_s: float) -> Findings:
    return run_tests([path for path in marked_files() if KERNELS in path.parents], setting, limit_s)


def run_others(setting: Setting, limit_s: float) -> Findings:
    return run_tests([path for path in marked_files() if KERNELS not in path.parents], setting, limit_s)


def marked_files() -> list[Path]:
    """Files with tests that are marked `cuda`. Only these are imported: others may need what is not installed."""
    return [path for path in sorted(TESTS.rglob("test_*.py")) if "mark.cuda" in path.read_text()]


def run_tests(files: Sequence[Path], setting: Setting, limit_s: float) -> Findings:
    """In a rehearsal, these tests say that they are skipped."""
    record = setting.scratch / "tests.jsonl"
    record.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "pytest", *map(str, files), "-m", "cuda", "-q", "-p", "bench.gpu.record"),
        *("-p", "no:cacheprovider", *(in_parallel() if setting.device == "cuda" else [])),
    ]
    ended = run_command(command, limit_s, {VARIABLE: str(record)})
    outcomes = outcomes_in(record)
    counts = Counter(outcome.outcome for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.outcome == "failed"]
    return Findings(
        problem_of(counts, setting) or ended.problem,
        notes=[", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "no test has ended"],
        tables=tables_of(failed, outcomes),
        figures={"counts": dict(counts), "tests": [vars(outcome) for outcome in outcomes]},
        output=ended.output,
    )


def problem_of(counts: Counter[str], setting: Setting) -> str | None:
    if counts["failed"]:
        return f"{counts['failed']} of {counts.total()} tests failed"
    if setting.device == "cuda" and not counts["passed"]:
        return "no test has passed"
    return None


def in_parallel() -> list[str]:
    if not find_spec("xdist"):
        return []
    return [f"--numprocesses={max(1, min(MAX_PROCESSES, len(os.sched_getaffinity(0)) // 2))}"]


def tables_of(failed: Sequence[Outcome], outcomes: Sequence[Outcome]) -> list[Table]:
    tables = []
    if failed:
        rows = [(outcome.test, outcome.message) for outcome in failed[:SHOWN]]
        tables.append(Table(f"Failed, {len(rows)} of {len(failed)}", ("test", "message"), rows))
    slowest = sorted(outcomes, key=lambda outcome: -outcome.seconds)[:3]
    if slowest:
        rows = [(outcome.test, f"{outcome.seconds:.1f}") for outcome in slowest]
        tables.append(Table("The slowest", ("test", "s"), rows))
    return tables
