"""One method, once, in processes of its own: what came of it, or why nothing did."""

from __future__ import annotations

import json
import re
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bench.compare.bandwidth import Bandwidth
from bench.compare.methods import METHODS
from bench.compare.rank import Figures, Job
from bench.compare.setting import Setting
from bench.compare.timeline import Range
from bench.launch import running_ranks
from bench.watch import Moments, above_first, held_bytes, watch

ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?([\w.]*(?:Error|Exception|Refused)\b.*)")


@dataclass
class Run:
    """Everything that is known of it; the reports are made of these and nothing else.

    Attributes:
        problem: why there are no figures; None where there are.
        ranks: what each has measured.
        together: bytes that all ranks held at the moment when it was most: of shared pages, each has its part.
        samples: how many moments were looked at.
    """

    method: str
    setting: Setting
    problem: str | None = None
    ranks: list[Figures] | None = None
    together: int | None = None
    samples: int = 0


def run_method(job: Job, interval_s: float, timeout_s: float) -> Run:
    """Train by `job.method` and report it. Whatever goes wrong there is in the report."""
    obstacle = METHODS[job.method].why_not(job.setting)
    if obstacle is not None:
        return Run(job.method, job.setting, problem=obstacle)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        figures = Path(folder) / "figures.json"
        options = ["--job", job.to_json()]
        with running_ranks("bench.compare.rank", options, job.setting, figures, output) as torchrun:
            deadline = threading.Timer(timeout_s, torchrun.terminate)
            deadline.start()
            moments = watch(torchrun, figures, interval_s, held_bytes)
            status = torchrun.wait()
        stopped = not deadline.is_alive()
        deadline.cancel()
        if status:
            problem = f"stopped after {timeout_s:.0f} s" if stopped else reason_in(output)
            return Run(job.method, job.setting, problem=problem)
        return Run(job.method, job.setting, None, read_figures(figures), most_together(moments), len(moments))


def reason_in(output: BinaryIO) -> str:
    """The first error that ranks have printed, which mostly explains the others; else how the first of them ended."""
    output.seek(0)
    lines = output.read().decode(errors="replace").splitlines()
    errors = [match[1] for match in map(ERROR.match, lines) if match and "ChildFailedError" not in match[1]]
    ends = [line.strip() for line in lines if line.strip().startswith("exitcode")]
    return [*errors, *ends, *reversed(lines), "failed without a word"][0]


def read_figures(path: Path) -> list[Figures]:
    return [figures_from(fields) for fields in json.loads(path.read_text())]


def figures_from(fields: dict[str, Any]) -> Figures:
    """From JSON."""
    bandwidth = fields["bandwidth"] and Bandwidth(**fields["bandwidth"])
    ranges = [Range(**entry) for entry in fields["ranges"]]
    return Figures(**{**fields, "bandwidth": bandwidth, "ranges": ranges})


def run_from(fields: dict[str, Any]) -> Run:
    """From JSON."""
    ranks = fields["ranks"] and [figures_from(entry) for entry in fields["ranks"]]
    return Run(**{**fields, "setting": Setting(**fields["setting"]), "ranks": ranks})


def most_together(moments: Moments) -> int:
    return max(map(sum, above_first(moments)))
