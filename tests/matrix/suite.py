"""An environment of one cell, and what is run in it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tests.matrix.cells import Cell
from tests.matrix.trees import Trees
from tests.matrix.uv import CommandError, Uv, run
from tests.support.paths import ROOT

# The last two are for torch's own tables of optimizers.
TOOLS = ("numpy", "hypothesis", "pytest", "pytest-timeout", "expecttest", "setuptools")
# They ask for more packages, or, as csrc and fuzz, for no torch.
OTHERS = ("bench", "csrc", "docs", "examples", "fuzz", "integrations", "matrix", "pretend_cuda", "recipes")
# What no torch and no Python changes: the arithmetic of kernels, numbers alone, and the sources.
UNCHANGED = (
    "ops/test_move.py",
    "ops/test_quantize.py",
    "ops/test_steps.py",
    "ops/test_steps_control.py",
    "ops/test_steps_layouts.py",
    "ops/test_steps_norms.py",
    "ops/test_storage.py",
    "ops/test_wire_code.py",
    "optim/test_fused_tiers.py",
    "collectives/test_levels.py",
    "collectives/test_rounds.py",
    "test_imports.py",
)
ONE_PROCESS = ("tests", *(f"--ignore=tests/{path}" for path in (*OTHERS, *UNCHANGED)))
RANKS = (
    "tests/training/test_parity.py::test_own_step_follows_ddp_bit_for_bit",
    "tests/training/test_parity.py::test_convolutions_and_batch_norm_follow_ddp_bit_for_bit",
    "tests/training/test_parity.py::test_torch_transport_follows_ddp",
    "tests/state/test_torch_releases.py",
    "tests/state/test_dicts.py::test_saving",
    "tests/checkpoint/wrapped/test_resuming.py",
)
SUITE = {"one process": (*ONE_PROCESS, "-m", "not ranks and not slow"), "ranks": (*RANKS, "-m", "ranks")}
TIMEOUT_S = 600


class Outcome(NamedTuple):
    """Numbers of tests; `trouble` is what kept them from being run, or empty."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    trouble: str = ""

    @property
    def good(self) -> bool:
        return self.passed > 0 and not self.failed and not self.trouble

    def __str__(self) -> str:
        if self.trouble:
            return self.trouble
        numbers = {"passed": self.passed, "failed": self.failed, "skipped": self.skipped}
        return ", ".join(f"{number} {what}" for what, number in numbers.items() if number)


def run_cell(cell: Cell, python: Path, folder: Path, uv: Uv, trees: Trees) -> Outcome:
    """Make the environment of a cell, and run the suite in it. One in which something has failed stays; `uv.log` says what."""
    environment = folder / str(cell)
    try:
        uv.make(environment, python)
        uv.install(environment, f"torch=={cell.torch}", *TOOLS, "--constraints", str(_constraints(folder)))
        tree = trees.of(cell.python, environment, uv)
    except CommandError as error:
        return Outcome(trouble=str(error))
    outcome = _total([_run_tests(environment, tree, uv.log, what, tests) for what, tests in SUITE.items()])
    if outcome.good:
        shutil.rmtree(environment)
    return outcome


def _constraints(folder: Path) -> Path:
    """Those of development, torch excepted."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    path = folder / "constraints.txt"
    path.write_text("\n".join(line for line in lines if not line.startswith("torch==")))
    return path


def _run_tests(environment: Path, tree: Path, log: Path, what: str, tests: Sequence[str]) -> Outcome:
    report = log.with_name(f"{log.stem} {what}.xml")
    report.unlink(missing_ok=True)
    options = (
        f"--timeout={TIMEOUT_S}",
        "--quiet",
        "--continue-on-collection-errors",
        "--hypothesis-profile=few",
        "-p",
        "no:cacheprovider",
        f"--junit-xml={report}",
    )
    command = [str(environment / "bin" / "python"), "-m", "pytest", *tests, *options]
    status = run(command, log, cwd=tree, OMP_WAIT_POLICY="PASSIVE")  # as `make test`
    outcome = read_report(report) if report.exists() else Outcome()
    return outcome if status == 0 or outcome.failed else outcome._replace(trouble=f"pytest ended with {status}")


def read_report(path: Path) -> Outcome:
    """The numbers of a file that pytest has written in JUnit's format."""
    tests, failed, skipped = 0, 0, 0
    for suite in ElementTree.parse(path).iter("testsuite"):
        tests += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return Outcome(tests - failed - skipped, failed, skipped)


def _total(outcomes: Sequence[Outcome]) -> Outcome:
    total = Outcome()
    for one in outcomes:
        total = Outcome(*(a + b for a, b in zip(total[:3], one[:3], strict=True)), total.trouble or one.trouble)
    return total
