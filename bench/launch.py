"""Ranks on this machine: processes of one process group, each of which calls the same function.

    this process                              rank r, forked from a server that has imported torch
    function, args        ── pickle ──▶       function(*args)
    its value or Failure  ◀── pickle ──

All ranks of a command come from one server (`multiprocessing`'s forkserver), so torch is imported once for all of them. They end
with this process, however it ends.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.machine import describe_machine

HOST = "127.0.0.1"
FAREWELL_S = 10.0  # what ranks get to end by themselves when all have returned, or one has failed
PRELOADED = ("torch._dynamo", "zeroopt", "rich.progress")  # the first is what a first optimizer imports


@dataclass(frozen=True)
class Failure:
    """What a rank gives instead of a value.

    Attributes:
        moment: by `time.monotonic`, which is the same for all processes.
        reason: one line.
    """

    moment: float
    reason: str
    traceback: str


class RankFailed(Exception):
    """The first rank that failed, whose error mostly explains the others'.

    Attributes:
        reason: one line.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(f"{reason}\n{details}".rstrip())
        self.reason = reason


@dataclass(frozen=True)
class Plan:
    """How ranks are to run.

    Attributes:
        threads: CPU threads a rank.
        timeout_s: after which they are stopped; None: never.
        quiet: whether what they print is dropped.
    """

    world_size: int
    threads: int
    backend: str = "gloo"
    timeout_s: float | None = None
    quiet: bool = False


@contextmanager
def running_ranks(plan: Plan, function: Callable[..., Any], *args: Any) -> Iterator[Ranks]:
    """Ranks at work. Whoever has not ended by the end of the context is killed.

    Args:
        function: called in a process group of all ranks. Importable, as its arguments are picklable.
    """
    ranks = Ranks(plan)
    try:
        ranks.start(function, args)
        yield ranks
        for process in ranks.processes:
            process.join(FAREWELL_S)
    finally:
        ranks.kill()


class Ranks:
    """Ranks at work; made by `running_ranks`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self.deadline = time.monotonic() + (plan.timeout_s or float("inf"))
        self.processes: list[ForkServerProcess] = []
        self.answers: dict[int, Any] = {}
        self._waiting: dict[Connection, int] = {}

    def start(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        os.environ["OMP_NUM_THREADS"] = str(self.plan.threads)  # OpenMP reads it when it is loaded: in the server
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, function.__module__])
        for rank in range(self.plan.world_size):
            connection, rank_end = context.Pipe(duplex=False)
            self._waiting[connection] = rank
            arguments = (rank_end, rank, self.plan, self.store.port, function, args)
            process = context.Process(target=serve, args=arguments, daemon=True)
            self.processes.append(process)
            process.start()
            rank_end.close()  # so that the pipe ends when the rank does

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self._waiting:
            connection.close()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes if process.pid is not None]

    def have_returned(self, within_s: float) -> bool:
        """Whether all have, or do in so many seconds.

        Raises:
            RankFailed: one of them has failed, or time is up for all.
        """
        now = time.monotonic()
        if now > self.deadline:
            raise RankFailed(f"stopped after {self.plan.timeout_s:.0f} s")
        if failures := self._receive(min(within_s, self.deadline - now)):
            first = min(failures + self._later_failures(), key=lambda failure: failure.moment)
            raise RankFailed(first.reason, first.traceback)
        return not self._waiting

    def _later_failures(self) -> list[Failure]:
        """A rank that is killed closes its connections one by one, and others may tell of theirs before its own end is heard of."""
        until = time.monotonic() + FAREWELL_S
        failures = []
        while self._waiting and (left_s := until - time.monotonic()) > 0:
            failures += self._receive(left_s)
        return failures

    def _receive(self, within_s: float) -> list[Failure]:
        """Answers of ranks, of which it returns those that have failed."""
        answers = [self._answer(connection) for connection in wait(list(self._waiting), within_s)]
        return [answer for answer in answers if isinstance(answer, Failure)]

    def _answer(self, connection: Any) -> Any:
        rank = self._waiting.pop(connection)
        try:
            self.answers[rank] = connection.recv()
        except (EOFError, OSError):  # what has ended it makes the others fail, so it came first
            self.processes[rank].join()
            self.answers[rank] = Failure(0.0, f"rank {rank} {end_of(self.processes[rank])}", "")
        connection.close()
        return self.answers[rank]

    def values(self) -> list[Any]:
        """What the function has returned, by rank. Waits for it.

        Raises:
            RankFailed: see `have_returned`.
        """
        while not self.have_returned(within_s=1.0):
            pass
        return [self.answers[rank] for rank in range(self.plan.world_size)]


def run_ranks(plan: Plan, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What the function returns on each rank. Raises `RankFailed`."""
    with running_ranks(plan, function, *args) as ranks:
        return ranks.values()


def end_of(process: ForkServerProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with status {code}"


def serve(
    connection: Connection, rank: int, plan: Plan, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """The life of a rank."""
    threading.Thread(target=die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has started it
    if plan.quiet:
        silence()
    try:
        connection.send(call_in_group(rank, plan, port, function, args))
    except BaseException as error:  # noqa: BLE001  a library may exit
        reason = traceback.format_exception_only(error)[-1].splitlines()[0]
        connection.send(Failure(time.monotonic(), reason, f"On rank {rank}:\n{traceback.format_exc()}"))


def die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def silence() -> None:
    with open(os.devnull, "w") as nowhere:
        for descriptor in (1, 2):
            os.dup2(nowhere.fileno(), descriptor)


def call_in_group(rank: int, plan: Plan, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    os.environ |= environment_of(rank, plan, port)
    torch.set_num_threads(plan.threads)
    store = dist.TCPStore(HOST, port, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group(plan.backend, store=store, rank=rank, world_size=plan.world_size)
    value = function(*args)
    dist.barrier()
    time.sleep(0.1)  # Gloo's threads let go of the last tensors
    dist.destroy_process_group()
    return value


def environment_of(rank: int, plan: Plan, port: int) -> dict[str, str]:
    """As torchrun sets it, for libraries that look there."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": plan.world_size, "LOCAL_WORLD_SIZE": plan.world_size}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": HOST, "MASTER_PORT": str(port)}


def write_report(path: Path, module: str, figures: dict[str, object]) -> None:
    """The figures with the command that gave them and the machine that it ran on, as JSON."""
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "machine": describe_machine(), **figures}, indent=1) + "\n")
