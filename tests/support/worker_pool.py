"""Worker processes that run a function on every rank of a Gloo process group, kept from one test to the next.

Importing torch takes seconds, so workers are forked from one server process that has imported it, and there is one pool
of them per world size. A test starts with a new default process group; its calls share it. Functions and values travel
as plain pickles over pipes, so a killed worker leaves nothing behind.

    test process                             worker of rank r
    (function, args, kwargs)  ── pickle ──▶  function(*args, **kwargs)
    value or Failure          ◀── pickle ──  gc.collect()

A function has to be importable: define it at the top level of a test module. Workers keep the environment variables of
the moment when the first of them was started. A view of a tensor takes its whole storage along: clone a slice before
returning it.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
import torch._dynamo
import torch.distributed as dist

T = TypeVar("T")

TIMEOUT_S = 180.0  # of a call: what compiles, or imports half of torch, takes a minute on a busy machine
GRACE_S = 60.0  # what the other ranks get after the first failure: they may be waiting for the rank that failed
START_TIMEOUT_S = 120.0
NEW_GROUP_TIMEOUT_S = 120.0
STACK_DUMP_S = 30.0  # at most, on a busy machine
STACKS_LOOK_S = 0.25
MAX_WORKERS = 10  # of all pools: those of 1, 2, 3 and 4 ranks together
SHOWN_OUTPUT = 4000  # last characters of a failing rank's stdout and stderr
SEED = 0

# Loopback works without a network. OpenMP reads its variable when it is loaded: in the server that forks the workers.
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

# pytest: a worker imports the test process's main module, which imports pytest. torch imports torch._dynamo when it is
# first needed, by DistributedDataParallel for one: a second, and then 70 ms of every worker's `gc.collect()`.
PRELOADED = ["torch.distributed", "torch._dynamo", "pytest", "zeroopt"]

NO_ANSWER = "NoAnswer"
WORKER_DIED = "WorkerDied"


class RankError(NamedTuple):
    """An exception's type and text. Where there was none, `type_name` is `NO_ANSWER` or `WORKER_DIED`."""

    type_name: str
    message: str

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


@dataclass(frozen=True)
class Failure:
    """What a rank gives instead of a value."""

    error: RankError
    evidence: str
    """Traceback of the exception, or the stacks of a rank that did not answer."""
    output: str = ""
    """End of what the rank wrote to stdout and stderr during the call."""


class WorkerError(Exception):
    """A call that failed on the ranks in `errors`."""

    def __init__(self, headline: str, failures: dict[int, Failure]) -> None:
        self.errors = {rank: failure.error for rank, failure in failures.items()}
        super().__init__("\n".join([headline, *(_report(rank, failure) for rank, failure in failures.items())]))


def _report(rank: int, failure: Failure) -> str:
    lines = [f"--- rank {rank}: {failure.error}", failure.evidence.rstrip()]
    if failure.output:
        lines += [f"--- rank {rank} wrote:", failure.output.rstrip()]
    return "\n".join(lines)


# Worker side.


def _serve(connection: Connection, rank: int, world_size: int, log: Path, stacks: Path) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test process, which kills its workers
    _redirect_output(log)
    with stacks.open("w") as stacks_file:
        faulthandler.register(signal.SIGUSR1, file=stacks_file, all_threads=True)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        gc.freeze()  # leaves torch's many objects out of every later collection
        with suppress(EOFError):
            while True:
                payload = connection.recv_bytes()
                torch.manual_seed(SEED)
                torch.set_num_threads(1)
                connection.send_bytes(_answer(payload))
                gc.collect()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _redirect_output(log: Path) -> None:
    # O_APPEND, so that the parent may truncate the file between calls.
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.close(descriptor)


def _answer(payload: bytes) -> bytes:
    modules = len(sys.modules)
    try:
        function, args, kwargs = pickle.loads(payload)
        if len(sys.modules) > modules:
            gc.freeze()  # a test module, and all that it imports
        return pickle.dumps(function(*args, **kwargs))
    except BaseException as error:  # noqa: BLE001  SystemExit too is an answer: the worker lives on
        return pickle.dumps(Failure(RankError(type(error).__name__, str(error)), traceback.format_exc()))


def forget_compiled_code() -> None:
    """Wrapped models wait for less in a process in which torch.compile has compiled nothing."""
    if torch._dynamo.utils.counters:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


def _new_group(init_method: str) -> None:
    forget_compiled_code()
    former = [dist.group.WORLD] if dist.is_initialized() else []
    if former:
        dist.destroy_process_group()
    ending = threading.Thread(target=former.clear)  # Gloo's threads take 20 ms to end, other ranks 10 ms to be found
    ending.start()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    ending.join()


# Test process side.


@dataclass(frozen=True)
class Worker:
    """One rank's process, as the test process sees it."""

    process: ForkServerProcess
    connection: Connection
    log: Path
    stacks: Path

    @classmethod
    def start(cls, rank: int, world_size: int, scratch: Path, server: ForkServer | None) -> Worker:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        connection, worker_end = context.Pipe()
        log, stacks = scratch / f"rank{rank}.log", scratch / f"rank{rank}.stacks"
        process = context.Process(target=_serve, args=(worker_end, rank, world_size, log, stacks), daemon=True)
        with patch.dict(os.environ, WORKER_ENVIRONMENT), _forking_from(server):
            process.start()
        worker_end.close()  # so that the pipe ends when the worker does
        return cls(process, connection, log, stacks)

    def send(self, payload: bytes) -> None:
        with suppress(FileNotFoundError):
            os.truncate(self.log, 0)
        with suppress(ConnectionError):  # a dead worker is reported by `receive`
            self.connection.send_bytes(payload)

    def receive(self) -> Any:
        try:
            answer = self.connection.recv_bytes()
        except (EOFError, ConnectionError):
            self.process.join(timeout=60)
            return Failure(RankError(WORKER_DIED, _exit_reason(self.process.exitcode)), "", self.output())
        value = pickle.loads(answer)
        return Failure(value.error, value.evidence, self.output()) if isinstance(value, Failure) else value

    def ask_for_stacks(self) -> None:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)

    def stacks_written(self) -> int:
        """Bytes."""
        return self.stacks.stat().st_size if self.stacks.exists() else 0

    def silence(self) -> Failure:
        stacks = self.stacks.read_text() if self.stacks.exists() else ""
        return Failure(RankError(NO_ANSWER, "did not answer in time; its stacks:"), stacks, self.output())

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-SHOWN_OUTPUT:] if self.log.exists() else ""

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


def _server_with(modules: Sequence[str]) -> ForkServer:
    server = ForkServer()
    server.set_forkserver_preload([*PRELOADED, *modules])
    return server


def _forking_from(server: ForkServer | None) -> AbstractContextManager[object]:
    """Processes come from this server; None: from the one that all share."""
    if server is None:
        return nullcontext()
    return patch("multiprocessing.forkserver.connect_to_new_process", server.connect_to_new_process)


def _exit_reason(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exited with code {exitcode}"


class WorkerPool:
    """The workers of one process group. A call that some rank does not answer closes the pool."""

    def __init__(self, world_size: int, server: ForkServer | None = None) -> None:
        self._scratch = TemporaryDirectory(prefix="zeroopt-workers-")
        self._workers: list[Worker] = []
        self._groups = 0
        self._test: str | None = None  # whose process group it is; None: nobody's
        for rank in range(world_size):
            self._workers.append(Worker.start(rank, world_size, Path(self._scratch.name), server))

    @property
    def closed(self) -> bool:
        return not self._workers

    def enter(self, test: str) -> None:
        """Give a test its own process group: an earlier one may have left collectives unfinished."""
        if self._test != test:
            self._start_group()
            self._test = test

    def call(self, payload: bytes, timeout: float, grace: float) -> list[Any]:
        """Each rank's value or `Failure`."""
        try:
            for worker in self._workers:
                worker.send(payload)
            answers = self._collect(timeout, grace)
            answers |= self._silent(set(range(len(self._workers))) - answers.keys())
        except BaseException:  # Ctrl-C, or a value that cannot be unpickled here: answers are still on their way
            self.close()
            raise
        failures = [answer for answer in answers.values() if isinstance(answer, Failure)]
        if any(failure.error.type_name in (NO_ANSWER, WORKER_DIED) for failure in failures):
            self.close()
        elif failures:
            self._test = None  # ranks may be out of step: the next call, even of the same test, needs a new group
        return [answer for _, answer in sorted(answers.items())]

    def close(self) -> None:
        while self._workers:
            self._workers.pop().kill()
        self._scratch.cleanup()

    def _start_group(self) -> None:
        timeout = NEW_GROUP_TIMEOUT_S if self._groups else START_TIMEOUT_S
        self._groups += 1
        # A file in our own directory cannot collide with another run, as a port could.
        payload = pickle.dumps((_new_group, (f"file://{self._scratch.name}/group{self._groups}",), {}))
        answers = self.call(payload, timeout, GRACE_S)
        if failures := _failures(answers):
            self.close()
            raise WorkerError("cannot start a process group", failures)

    def _collect(self, timeout: float, grace: float) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        waiting = {worker.connection: rank for rank, worker in enumerate(self._workers)}
        deadline = time.monotonic() + timeout
        while waiting and (remaining := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), remaining):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                answers[rank] = self._workers[rank].receive()
                if isinstance(answers[rank], Failure):
                    deadline = min(deadline, time.monotonic() + grace)
        return answers

    def _silent(self, ranks: set[int]) -> dict[int, Failure]:
        if not ranks:
            return {}
        for rank in ranks:
            self._workers[rank].ask_for_stacks()
        self._wait_for_stacks(ranks)
        return {rank: self._workers[rank].silence() for rank in ranks}

    def _wait_for_stacks(self, ranks: set[int]) -> None:
        """Until all have written theirs, and write no more."""
        deadline = time.monotonic() + STACK_DUMP_S
        before: list[int] = []
        while time.monotonic() < deadline:
            time.sleep(STACKS_LOOK_S)
            written = [self._workers[rank].stacks_written() for rank in ranks]
            if all(written) and written == before:
                return
            before = written


def _failures(answers: list[Any]) -> dict[int, Failure]:
    return {rank: answer for rank, answer in enumerate(answers) if isinstance(answer, Failure)}


class RunOnRanks:
    """Runs functions on the ranks of pools that it starts when they are first needed.

    Keywords of every call: `timeout`, in seconds, and `grace`, what is left of it once a rank has failed.

    Args:
        preloaded: modules that workers find imported, where they are installed: they are forked from a server of their own then.
    """

    def __init__(self, preloaded: Sequence[str] = ()) -> None:
        self._server = _server_with(preloaded) if preloaded else None
        self._pools: dict[int, WorkerPool] = {}  # least recently used first

    def __call__(
        self,
        world_size: int,
        function: Callable[..., T],
        *args: Any,
        timeout: float = TIMEOUT_S,
        grace: float = GRACE_S,
        **kwargs: Any,
    ) -> list[T]:
        """Values by rank; raises one `WorkerError` that shows every failing rank."""
        answers = self._answers(world_size, pickle.dumps((function, args, kwargs)), timeout, grace)
        if failures := _failures(answers):
            raise WorkerError(_headline(function, failures, world_size), failures)
        return answers

    def outcomes(
        self,
        world_size: int,
        function: Callable[..., T],
        *args: Any,
        timeout: float = TIMEOUT_S,
        grace: float = GRACE_S,
        **kwargs: Any,
    ) -> list[T | RankError]:
        """By rank the value or the error, for tests of errors; but a rank that does not answer raises `WorkerError`."""
        answers = self._answers(world_size, pickle.dumps((function, args, kwargs)), timeout, grace)
        failures = _failures(answers)
        if any(failure.error.type_name == NO_ANSWER for failure in failures.values()):
            raise WorkerError(_headline(function, failures, world_size), failures)
        return [answer.error if isinstance(answer, Failure) else answer for answer in answers]

    def close(self) -> None:
        while self._pools:
            self._pools.popitem()[1].close()
        if self._server is not None:
            self._server._stop()  # type: ignore[attr-defined]

    def _answers(self, world_size: int, payload: bytes, timeout: float, grace: float) -> list[Any]:
        return self._pool(world_size).call(payload, timeout, grace)

    def _pool(self, world_size: int) -> WorkerPool:
        pool = self._pools.pop(world_size, None)
        if pool is not None and not pool.closed:
            # A pool that cannot start another group is closed by the attempt.
            with suppress(WorkerError):
                pool.enter(_current_test())
        if pool is None or pool.closed:
            self._make_room(world_size)
            pool = WorkerPool(world_size, self._server)
            pool.enter(_current_test())
        self._pools[world_size] = pool
        return pool

    def _make_room(self, world_size: int) -> None:
        while self._pools and sum(self._pools) + world_size > MAX_WORKERS:
            self._pools.pop(next(iter(self._pools))).close()


def _current_test() -> str:
    name, _, _phase = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")
    return name or "outside a test"


def _headline(function: Callable[..., Any], failures: dict[int, Failure], world_size: int) -> str:
    name = getattr(function, "__qualname__", repr(function))
    return f"{_current_test()}: {name} failed on {len(failures)} of {world_size} ranks"
