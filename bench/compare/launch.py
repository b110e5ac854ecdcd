"""One method, once, in processes of its own: what came of it, or why nothing did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.compare.bandwidth import Bandwidth
from bench.compare.methods import METHODS
from bench.compare.rank import Figures, Job, work
from bench.compare.setting import Setting
from bench.compare.timeline import Range
from bench.launch import Plan, RankFailed, running_ranks
from bench.watch import Moments, Watch, above_first, held_bytes


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
    setting = job.setting
    obstacle = METHODS[job.method].why_not(setting)
    if obstacle is not None:
        return Run(job.method, setting, problem=obstacle)
    backend = "nccl" if setting.device == "cuda" else "gloo"
    plan = Plan(setting.world_size, setting.threads, backend, timeout_s, quiet=True)
    watch = Watch()
    try:
        with running_ranks(plan, work, job, watch) as ranks:
            moments = watch.moments(ranks, interval_s, held_bytes)
            figures = ranks.values()
    except RankFailed as failure:
        return Run(job.method, setting, problem=failure.reason)
    return Run(job.method, setting, None, figures, most_together(moments), len(moments))


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
