"""SIGKILL of one or all ranks before any of the calls with which a save changes the disk: the old or the new checkpoint loads."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from worker_pool import PRELOADED, TIMEOUT_S, WORKER_ENVIRONMENT
from written_checkpoints import version_of, write

from zeroopt.checkpoint.disk import files
from zeroopt.checkpoint.disk.siblings import latest

pytestmark = pytest.mark.slow

EVENTS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "shutil.rmtree",
    "fcntl.flock",
}
CONTEXT = multiprocessing.get_context("forkserver")
KILLED, UNHURT, FAILED = "killed", "unhurt", "failed"


class Countdown:
    """Kills this process before call number `calls` of those that change or look at the disk."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def start(self, *, writes: bool) -> None:
        sys.addaudithook(lambda event, _: self.count() if event in EVENTS else None)
        fsync, crc32, dll = os.fsync, files.zlib.crc32, ctypes.CDLL

        def counted(call: Any, every: int = 1) -> Any:
            turns = count()

            def counting(*args: Any, **options: Any) -> Any:
                if next(turns) % every == 0:
                    self.count()
                return call(*args, **options)

            return counting

        os.fsync = counted(fsync)
        ctypes.CDLL = counted(dll)  # type: ignore[misc]  renameat2 comes next
        if writes:
            files.zlib.crc32 = counted(crc32, every=8)  # of a file half written there is little to tell


def save_and_die(path: Path, version: int, rank: int, size: int, calls: int, writes: bool, keep: int | None) -> None:
    group = None
    if size > 1:
        dist.init_process_group(
            "gloo", f"file://{path.parent}/store{version}", timedelta(seconds=TIMEOUT_S / 2), rank=rank, world_size=size
        )
        group = dist.group.WORLD
        dist.barrier()  # nobody dies while the other connects
    Countdown(calls).start(writes=writes)
    write(path, version, group, keep=keep)


def serve(connection: Connection, rank: int, size: int) -> None:
    """Save in processes that die; none of them has to import anything."""
    while True:
        path, version, calls, writes, keep = connection.recv()
        child = os.fork()
        if child == 0:
            try:
                save_and_die(path, version, rank, size, calls, writes, keep)
                os._exit(0)
            except BaseException as error:  # noqa: BLE001  whatever a rank makes of the death of another
                print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        connection.send(KILLED if os.WIFSIGNALED(status) else [UNHURT, FAILED][os.WEXITSTATUS(status)])


class Ranks:
    """Processes that save in children of theirs, and outlive them."""

    def __init__(self, size: int) -> None:
        self._connections: list[Connection] = []
        self._processes = []
        CONTEXT.set_forkserver_preload(PRELOADED)
        for rank in range(size):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=serve, args=(there, rank, size), daemon=True)
            with patch.dict(os.environ, WORKER_ENVIRONMENT):
                process.start()
            self._connections.append(here)
            self._processes.append(process)

    def save(
        self, path: Path, version: int, calls: list[int], writes: bool = False, keep: int | None = None
    ) -> list[str]:
        """How each rank ended, whose call of that number is its last."""
        for connection, number in zip(self._connections, calls, strict=True):
            connection.send((path, version, number, writes, keep))
        answers = []
        for connection in self._connections:
            assert connection.poll(TIMEOUT_S), "a rank hangs"
            answers.append(connection.recv())
        return answers

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Ranks]]:
    with closing(Ranks(1)) as alone, closing(Ranks(2)) as two:
        yield {1: alone, 2: two}


NEVER = 1 << 30


@pytest.mark.parametrize(
    "victims", [[True], [True, False], [False, True], [True, True]], ids=["alone", "rank 0 of 2", "rank 1 of 2", "both"]
)
def test_a_kill_at_any_call_leaves_the_old_or_the_new_checkpoint(
    victims: list[bool], tmp_path: Path, ranks: dict[int, Ranks]
) -> None:
    path = tmp_path / "last"
    write(path, 0)
    old, calls, found_new = 0, 0, set()
    outcomes = [KILLED]
    while KILLED in outcomes:
        calls += 1
        last_calls = [calls if victim else NEVER for victim in victims]
        outcomes = ranks[len(victims)].save(path, calls, last_calls, writes=victims == [True])
        found = version_of(path)
        assert found in (old, calls)
        assert latest(tmp_path) == path
        found_new.add(found == calls)
        old = found
    assert outcomes == [UNHURT] * len(victims)
    assert found_new == {True, False}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["last"], "killed runs have left something"


def test_a_kill_during_the_first_save_leaves_nothing_or_all(tmp_path: Path, ranks: dict[int, Ranks]) -> None:
    outcome, calls = KILLED, 0
    while outcome == KILLED:
        calls += 1
        root = tmp_path / f"{calls}"
        [outcome] = ranks[1].save(root / "first", calls, [calls])
        if (found := latest(root)) is None:
            assert not (root / "first").exists()
        else:
            assert version_of(found) == calls
    assert found is not None


def test_a_kill_while_old_checkpoints_are_removed_leaves_one_that_loads(
    tmp_path: Path, ranks: dict[int, Ranks]
) -> None:
    before = tmp_path / "before"
    write(before / "step-1", 1)
    write(before / "step-2", 2)
    shutil.copytree(before / "step-1", before / ".step-0.01234567.partial")
    calls, outcome = 0, KILLED
    while outcome == KILLED:
        calls += 1
        root = tmp_path / f"{calls}"
        shutil.copytree(before, root)
        [outcome] = ranks[1].save(root / "step-3", 3, [calls], keep=1)
        found = latest(root)
        assert found in (root / "step-2", root / "step-3")
        assert found.name == f"step-{version_of(found)}"
    assert os.listdir(root) == ["step-3"]
