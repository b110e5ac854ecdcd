"""The first process of a host, process 1 of its PID namespace: forks the host's ranks.

It takes pickled `Job`s from stdin and answers each with a pickled list on stdout: by rank of this host, what the function returned, or a
`Failure`.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch._dynamo  # which building the first optimizer does otherwise, in every rank
import torch.distributed as dist

from bench.launch import Failure


@dataclass(frozen=True)
class Job:
    """A function for every rank, and the process group to run it in.

    Attributes:
        ranks: that this host has.
        address: of the first rank's store.
        timeout_s: for everything.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    ranks: range
    world_size: int
    address: str
    timeout_s: float


def serve() -> None:
    """Do jobs until stdin ends. When this process ends, so does every other one of its namespace."""
    answers_to = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what ranks print is for people
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(answers_of(job), answers_to)
        answers_to.flush()


def answers_of(job: Job) -> list[Any]:
    context = multiprocessing.get_context("fork")
    ranks = []
    for rank in job.ranks:
        connection, rank_end = context.Pipe(duplex=False)
        process = context.Process(target=answer, args=(job, rank, rank_end))
        process.start()
        rank_end.close()
        ranks.append((rank, process, connection))
    deadline = time.monotonic() + job.timeout_s
    answers = [receive(rank, connection, deadline) for rank, _, connection in ranks]
    for _, process, _ in ranks:
        process.kill()
        process.join()
    return answers


def receive(rank: int, connection: Connection, deadline: float) -> Any:
    if not connection.poll(max(0.0, deadline - time.monotonic())):
        return Failure(deadline, f"rank {rank} has not answered in time", "")
    try:
        return connection.recv()
    except EOFError:
        return Failure(0.0, f"rank {rank} has ended without an answer", "")


def answer(job: Job, rank: int, connection: Connection) -> None:
    """The life of a rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        timeout = timedelta(seconds=job.timeout_s)
        dist.init_process_group("gloo", init_method=job.address, rank=rank, world_size=job.world_size, timeout=timeout)
        value = job.function(*job.args)
        dist.barrier()
        connection.send(value)
        time.sleep(1.0)  # the others are through the barrier
    except BaseException as error:  # noqa: BLE001  a library may exit
        reason = traceback.format_exception_only(error)[-1].splitlines()[0]
        connection.send(Failure(time.monotonic(), reason, f"On rank {rank}:\n{traceback.format_exc()}"))
    connection.close()


if __name__ == "__main__":
    serve()
