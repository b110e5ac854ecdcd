"""Memory without a name: whoever may see it, it takes no descriptors, needs no /dev/shm, and goes with its processes."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from measure import run_fresh
from scripts import run_scripts
from torch import nn
from training import batch, build, loss_of, optimizer_for
from transports import CPU, connect, mapped_memory, open_memory
from worker_pool import WORKER_DIED, RankError, RunOnRanks

import zeroopt
from zeroopt.collectives import ControlGroup
from zeroopt.collectives.shared_memory import OpenMemory, map_together, open_peer_memory

pytestmark = pytest.mark.slow

PATIENCE_S = 60.0


def write_and_read(one_for_all: bool) -> tuple[list[list[int]], list[int], int]:
    """What this rank finds in the memory of all members when each has written in its own; which of it starts as zeros, and
    the mode that it has."""
    rank, group = dist.get_rank(), dist.group.WORLD
    pieces, descriptor = map_together(ControlGroup(group), range(group.size()), 4, one_for_all=one_for_all)
    mapped = [torch.frombuffer(memory, dtype=torch.uint8) for memory in pieces]
    zeros = [int(memory.eq(0).all()) for memory in mapped]
    dist.barrier()
    mapped[rank][rank] = 10 + rank
    dist.barrier()
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    return [memory.tolist() for memory in mapped], zeros, mode


def test_all_see_what_one_writes(run_on_ranks: RunOnRanks) -> None:
    apart = [[10, 0, 0, 0], [0, 11, 0, 0], [0, 0, 12, 0]]
    assert run_on_ranks(3, write_and_read, False) == [(apart, [1, 1, 1], 0o600)] * 3
    together = [[10, 11, 12, 0]] * 3
    assert run_on_ranks(3, write_and_read, True) == [(together, [1, 1, 1], 0o600)] * 3


def test_memory_of_another_file_is_refused() -> None:
    memory, other = OpenMemory(8), OpenMemory(8)
    pid, fd, device, _ = memory.address
    os.close(open_peer_memory(memory.address))
    descriptors = open_memory()
    with pytest.raises(OSError, match=f"/proc/{pid}/fd/{fd} is another file"):
        open_peer_memory([pid, fd, device, other.address[3]])
    assert open_memory() == descriptors
    for closed in (memory, other):
        os.close(closed.fd)


def count_descriptors() -> list[int]:
    """Of this rank, before and after it has allocated buffers, and while a model of many buckets is trained."""
    train_a_little()  # opens what stays open: connections, for example
    transport = connect("shm")
    gc.collect()  # models of before, which hold the descriptors of their boards
    counts = [len(os.listdir("/proc/self/fd"))]
    buffers = [transport.allocate(10, torch.float32, CPU, shared=i % 2 == 0) for i in range(100)]
    counts.append(len(os.listdir("/proc/self/fd")))
    del transport, buffers
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)))
    _, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters()), bucket_mb=1e-5)
    assert len(optimizer._trained.buckets) == 80
    counts.append(len(os.listdir("/proc/self/fd")))
    return counts


def test_buckets_take_no_descriptors(run_on_ranks: RunOnRanks) -> None:
    for before, with_buffers, with_model in run_on_ranks(2, count_descriptors):
        assert before == with_buffers == with_model


def train_a_little(halfway: Callable[[], None] = lambda: None, **options: Any) -> str:
    """Two steps; `halfway` is called in the second backward. The transport's name."""
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), bucket_mb=0.005, **options)
    for step in range(2):
        if step == 1:
            net.scale.register_hook(lambda _: halfway())
        loss_of(model(batch("mlp", step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer._transport.name


CLONE_NEWNS = 0x00020000  # from sched.h
MS_REC, MS_PRIVATE = 0x4000, 1 << 18  # from sys/mount.h


@contextmanager
def other_dev_shm(options: bytes) -> Iterator[None]:
    """From here on, this thread and those that it starts have a /dev/shm of their own."""
    libc = ctypes.CDLL(None, use_errno=True)
    calls = [
        lambda: libc.unshare(CLONE_NEWNS),
        lambda: libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),  # what follows is for this namespace only
        lambda: libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, options),
    ]
    for call in calls:
        if call() != 0:
            raise OSError(ctypes.get_errno(), "cannot make a mount namespace")
    yield


def train_with_dev_shm(options: bytes) -> tuple[str, int, list[str]]:
    """The transport, the bytes that /dev/shm has, and what lies in it afterwards."""
    with other_dev_shm(options):
        name = train_a_little()
        size = os.statvfs("/dev/shm")
        return name, size.f_blocks * size.f_frsize, os.listdir("/dev/shm")


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root can mount another /dev/shm")
@pytest.mark.parametrize("options", [b"size=64k", b"size=4k,mode=000"])
def test_dev_shm_does_not_matter(options: bytes) -> None:
    for name, size, files in run_fresh(2, train_with_dev_shm, options):
        assert name == "shm"
        assert size <= 2**16
        assert files == []


class Left(NamedTuple):
    """What a training has left when its rank has dropped the model.

    Attributes:
        mapped: pieces of shared memory that the rank had mapped meanwhile.
        holders: processes that still have one of them, when all ranks have had time to drop theirs.
        files: what the rank has opened or mapped that has a name.
    """

    outcome: str
    mapped: int
    holders: list[str]
    files: set[str]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("enough")


def nothing() -> None:
    pass


def train_and_drop(halfway: Callable[[], None], share_parameters: bool) -> Left:
    """Rank 1 does something in the middle of a backward."""
    train_a_little(transport="pairwise")  # loads what is loaded only once
    files, inodes = named_files(), set[int]()

    def note_then_act() -> None:
        inodes.update(mapped_memory())
        if dist.get_rank() == 1:
            halfway()

    outcome = outcome_of(note_then_act, share_parameters)
    torch.ones(
        1, requires_grad=True
    ).sum().backward()  # until the next backward, torch keeps the graph of one that failed
    gc.collect()
    deadline = time.monotonic() + PATIENCE_S
    while (holders := holders_of(inodes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return Left(outcome, len(inodes), holders, named_files() - files)


def outcome_of(halfway: Callable[[], None], share_parameters: bool) -> str:
    try:
        return train_a_little(halfway, share_parameters=share_parameters)
    except (zeroopt.ZeroOptError, ValueError) as error:
        return type(error).__name__


def holders_of(inodes: set[int]) -> list[str]:
    return [pid for pid in os.listdir("/proc") if pid.isdecimal() and inodes & mapped_memory(pid)]


def named_files() -> set[str]:
    """Paths of files that this process has open or mapped."""
    paths = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # listdir's own, which is closed by now
            paths.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return {path for path in paths if path.startswith("/") and os.path.lexists(path)}


@pytest.mark.parametrize("share_parameters", [False, True])
@pytest.mark.parametrize(
    ("halfway", "outcome", "others_outcome"),
    [(nothing, "shm", "shm"), (fail, "ValueError", "CollectiveError"), (kill, "", "CollectiveError")],
)
def test_nothing_is_left(
    run_on_ranks: RunOnRanks, halfway: Callable[[], None], outcome: str, others_outcome: str, share_parameters: bool
) -> None:
    answers = run_on_ranks.outcomes(3, train_and_drop, halfway, share_parameters)
    if halfway is kill:
        assert answers[1] == RankError(WORKER_DIED, "killed by SIGKILL")
    for rank, left in enumerate(answers):
        if isinstance(left, Left):
            assert left.outcome == (outcome if rank == 1 else others_outcome)
            assert left.mapped > 0
            assert left.holders == []
            assert left.files == set()


JOB = """
import os, sys, torch, torch.distributed as dist, zeroopt
from transports import mapped_memory
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(os.environ["RANK"]), world_size=2)
net = torch.nn.Linear(3, 3)
model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters()), transport="shm")
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
print(*mapped_memory())
if dist.get_rank() == 1:
    raise ValueError("enough")
"""


def test_nothing_is_left_of_processes_that_end(tmp_path: Path) -> None:
    """Rank 0 comes to its end and rank 1 to an exception, while they still have their models."""
    temporary, job = tmp_path / "temporary", tmp_path / "job.py"
    temporary.mkdir()
    job.write_text(JOB)
    environment = {"TMPDIR": str(temporary)}
    first, second = run_scripts(2, tmp_path, job, f"file://{tmp_path}/store", environment=environment)
    assert (first.returncode, second.returncode) == (0, 1)
    assert first.errors == ""
    assert second.errors.endswith("ValueError: enough\n")
    inodes = set(map(int, first.output.split()))
    assert len(inodes) > 2
    assert holders_of(inodes) == []
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor")] == []
