"""A plugin of pytest: writes what became of each test as soon as it is known, for what is stopped in the middle.

ZEROOPT_TEST_RECORD=FILE python -m pytest -p bench.gpu.record ...
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

VARIABLE = "ZEROOPT_TEST_RECORD"


@dataclass(frozen=True)
class Outcome:
    """One test.

    Attributes:
        test: pytest's name of it.
        outcome: "passed", "failed" or "skipped".
        message: why it was not passed, in a line.
    """

    test: str
    outcome: str
    seconds: float
    message: str = ""


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # those of pytest-xdist report to the process that has started them
        config.pluginmanager.register(Recorder(Path(os.environ[VARIABLE])))


class Recorder:
    """Writes a line of JSON a test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.write(Outcome(report.nodeid, report.outcome, report.duration, message_of(report)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(Outcome(report.nodeid, "failed", 0.0, message_of(report)))

    def write(self, outcome: Outcome) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


def message_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):  # where it was skipped, and why
        return str(report.longrepr[2])
    return report.longreprtext.strip().rpartition("\n")[2]


def outcomes_in(path: Path) -> list[Outcome]:
    """What has been written; nothing where no test has begun."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]
