"""The first process of a host of tests/training/test_many_hosts.py, process 1 of its PID namespace: forks the host's ranks.

It imports what ranks need, says so by a line on stdout, and then takes jobs from stdin, one a line: a folder, and the ranks that this
host has. `job` in that folder is a pickled `Job`. Each rank leaves there what its function returned, or a `Failure`, as
`rank<n>.answer`, and what it wrote as `rank<n>.log`. When all ranks have ended, there is another line on stdout.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which building the first optimizer does otherwise, in every rank: it takes a second
import torch.distributed as dist
from worker_pool import SEED, Failure, RankError


@dataclass(frozen=True)
class Job:
    """A function for every rank, and the process group to run it in.

    Attributes:
        limit_s: how long a rank may take for everything; then it dumps its stacks and ends.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    world_size: int
    init_method: str
    limit_s: float


def serve() -> None:
    """Run jobs until stdin ends. When this process ends, so does every other one of its namespace."""
    print("ready", flush=True)
    for line in sys.stdin:
        folder, *ranks = line.split()
        _run_job(Path(folder), [int(rank) for rank in ranks])
        print("done", flush=True)


def _run_job(folder: Path, ranks: list[int]) -> None:
    job = pickle.loads((folder / "job").read_bytes())
    for rank in ranks:
        if os.fork() == 0:
            try:
                _run_rank(job, rank, folder)
            finally:
                os._exit(0)  # without waiting for messages that nobody will send
    for _ in ranks:
        os.wait()


def _run_rank(job: Job, rank: int, folder: Path) -> None:
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    faulthandler.dump_traceback_later(job.limit_s, exit=True)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    answer = _answer(job, rank)
    sys.stdout.flush()
    incomplete = folder / f"rank{rank}.incomplete"
    incomplete.write_bytes(answer)
    incomplete.rename(folder / f"rank{rank}.answer")


def _answer(job: Job, rank: int) -> bytes:
    timeout = timedelta(seconds=job.limit_s)
    try:
        dist.init_process_group(
            "gloo", init_method=job.init_method, rank=rank, world_size=job.world_size, timeout=timeout
        )
        return pickle.dumps(job.function(*job.args))
    except BaseException as error:  # noqa: BLE001
        return pickle.dumps(Failure(RankError(type(error).__name__, str(error)), traceback.format_exc()))


if __name__ == "__main__":
    serve()
