"""Which transport a group gets, and what happens where memory cannot be shared: messages, or an error on all ranks alike."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from measure import run_fresh
from torch import Tensor
from training import batch, build, loss_of, optimizer_for, snapshot
from transports import CPU, LogLines, hosts, open_memory
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.collectives.select import check_transport, connect_transport

NOBODY = 65534


def choose(name: str, of_rank: Sequence[int], share_parameters: bool = False) -> tuple[str, list[str]]:
    """The transport's name, or the error, and what is logged."""
    with hosts(of_rank), LogLines() as lines:
        try:
            chosen = connect_transport(name, dist.group.WORLD, CPU, share_parameters=share_parameters).name
        except zeroopt.ConfigError as error:
            chosen = str(error)
    return chosen, lines


@pytest.mark.parametrize(
    ("name", "of_rank", "expected"),
    [
        *((name, [0], "single") for name in ("auto", "torch", "all_to_all", "pairwise", "shm")),
        *((name, [0, 0], name) for name in ("torch", "all_to_all", "pairwise", "shm")),
        ("auto", [0, 0], "shm"),
        ("auto", [0, 0, 0], "shm"),
        ("auto", [0, 1], "pairwise"),
        ("auto", [0, 1, 2], "pairwise"),
        ("auto", [0, 0, 1, 1], "hybrid"),
        ("auto", [0, 1, 1, 0], "hybrid"),
        ("torch", [0, 0, 1, 1], "torch"),
        ("pairwise", [0, 0, 1, 1], "pairwise"),
    ],
)
def test_choice(run_on_ranks: RunOnRanks, name: str, of_rank: list[int], expected: str) -> None:
    assert run_on_ranks(len(of_rank), choose, name, of_rank) == [(expected, [])] * len(of_rank)


FELL_BACK = "ranks do not share memory, gradients and parameters go through messages: "


def test_hosts_with_unlike_numbers_of_ranks(run_on_ranks: RunOnRanks) -> None:
    first, *others = run_on_ranks(4, choose, "auto", [0, 0, 0, 1])
    assert first == ("pairwise", [FELL_BACK + "hosts have different numbers of ranks, [3, 1]"])
    assert others == [("pairwise", [])] * 3


@pytest.mark.parametrize(
    ("name", "of_rank", "share_parameters", "expected"),
    [
        (
            "shm",
            [0, 1],
            False,
            "transport='shm' needs ranks that share memory: the ranks are on 2 hosts, for which transport='auto' is made",
        ),
        ("auto", [0, 1], True, "share_parameters=True needs ranks that share memory: no two ranks are on one host"),
        ("auto", [0, 0, 1], True, "share_parameters=True needs ranks that share memory: hosts have different numbers"),
        (
            "pairwise",
            [0, 0],
            True,
            "share_parameters=True needs ranks that share memory; transport='pairwise' does not",
        ),
        ("torch", [0, 0], True, "share_parameters=True needs ranks that share memory; transport='torch' does not"),
    ],
)
def test_what_cannot_be_had(
    run_on_ranks: RunOnRanks, name: str, of_rank: list[int], share_parameters: bool, expected: str
) -> None:
    answers = run_on_ranks(len(of_rank), choose, name, of_rank, share_parameters)
    assert answers == [answers[0]] * len(of_rank)
    message, lines = answers[0]
    assert message.startswith(expected)
    assert lines == []


def check_for_cuda(name: str) -> str:
    try:
        check_transport(name, dist.group.WORLD, torch.device("cuda"))
        return "no error"
    except zeroopt.ConfigError as error:
        return str(error)


@pytest.mark.parametrize("name", ["pairwise", "shm"])
def test_what_needs_gloo_and_cpu(run_on_ranks: RunOnRanks, name: str) -> None:
    (message,) = run_on_ranks(1, check_for_cuda, name)
    assert message.startswith(f"transport='{name}' needs CPU parameters and the Gloo backend, got cuda parameters")


# What keeps rank 1 from sharing memory.

Hindrance = Callable[[], AbstractContextManager[object]]


def fail_with(error: Callable[[], Exception]) -> Callable[..., None]:
    """A new exception each time: one that is kept would keep all that it has passed through."""

    def fail(*_: object) -> None:
        raise error()

    return fail


def refuse_memfd() -> AbstractContextManager[object]:
    return patch("os.memfd_create", fail_with(lambda: PermissionError(errno.EPERM, os.strerror(errno.EPERM))))


def limit_file_size() -> AbstractContextManager[object]:
    return patch("os.ftruncate", fail_with(lambda: OSError(errno.EFBIG, os.strerror(errno.EFBIG))))


def refuse_mapping() -> AbstractContextManager[object]:
    return patch(
        "zeroopt.collectives.shared_memory.SharedMapping",
        fail_with(lambda: RuntimeError("cannot map shared memory: no memory")),
    )


class SockFilter(ctypes.Structure):
    """An instruction of a seccomp filter, as in linux/filter.h."""

    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class SockProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("filter", ctypes.POINTER(SockFilter))]


MEMFD_CREATE = {"x86_64": 319, "aarch64": 279}  # numbers of the system call
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
BPF_LOAD, BPF_JUMP_IF_EQUAL, BPF_RETURN = 0x20, 0x15, 0x06
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 0x7FFF0000, 0x00050000


@contextmanager
def filter_memfd() -> Iterator[None]:
    """As containers do. It holds for the rest of this thread's life."""
    instructions = [
        SockFilter(BPF_LOAD, 0, 0, 0),  # the number of the system call
        SockFilter(BPF_JUMP_IF_EQUAL, 0, 1, MEMFD_CREATE[platform.machine()]),
        SockFilter(BPF_RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM),
        SockFilter(BPF_RETURN, 0, 0, SECCOMP_RET_ALLOW),
    ]
    program = SockProgram(len(instructions), (SockFilter * len(instructions))(*instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    yield


@contextmanager
def become_another_user() -> Iterator[None]:
    """For the rest of this process's life."""
    os.setuid(NOBODY)
    yield


class Attempt(NamedTuple):
    """A training, or an error that came instead; and what was logged."""

    transport: str
    parameters: list[Tensor]
    error: str
    log: list[str]


def attempt(**options: Any) -> Attempt:
    """Checks that after an error nothing has changed."""
    net = build("mlp")
    optimizer = optimizer_for("adamw", net)
    before, addresses = snapshot(net), [p.data_ptr() for p in net.parameters()]
    gc.collect()
    memory = open_memory()
    with LogLines() as lines:
        try:
            model, wrapped = zeroopt.wrap(net, optimizer, **options)
        except zeroopt.ConfigError as error:
            assert all(torch.equal(a, b) for a, b in zip(before, snapshot(net), strict=True))
            assert addresses == [p.data_ptr() for p in net.parameters()]
            assert open_memory() == memory
            return Attempt("", [], str(error), lines)
    for step in range(2):
        loss_of(model(batch("mlp", step))).backward()
        wrapped.step()
        wrapped.zero_grad()
    return Attempt(wrapped._transport.name, snapshot(net), "", lines)


def train_in_spite_of(hindrance: Hindrance) -> list[Attempt]:
    """With messages, before there is a hindrance; then with each option that is about shared memory."""
    attempts = [attempt(transport="pairwise")]
    variants: list[dict[str, Any]] = [{"transport": "auto"}, {"transport": "shm"}, {"share_parameters": True}]
    if dist.get_rank() != 1:
        return attempts + [attempt(**options) for options in variants]
    with hindrance():
        return attempts + [attempt(**options) for options in variants]


def assert_fell_back(by_rank: list[list[Attempt]], reason: str) -> None:
    """`reason` is a regular expression."""
    for rank, (before, auto, shm, share) in enumerate(by_rank):
        assert auto.transport == "pairwise"
        assert all(torch.equal(a, b) for a, b in zip(before.parameters, auto.parameters, strict=True))
        assert len(auto.log) == (1 if rank == 0 else 0)
        assert all(re.fullmatch(re.escape(FELL_BACK) + reason, line) for line in auto.log), auto.log
        for refused, option in ((shm, "transport='shm'"), (share, "share_parameters=True")):
            expected = (
                rf"{re.escape(option)} needs ranks that share memory: {reason}; leave it out to use messages instead"
            )
            assert re.fullmatch(expected, refused.error), refused.error
            assert refused.log == []


@pytest.mark.parametrize(
    ("hindrance", "reason"),
    [
        (refuse_memfd, r"rank 1 cannot make shared memory: \[Errno 1\] Operation not permitted"),
        (limit_file_size, r"rank 1 cannot make shared memory: \[Errno 27\] File too large"),
        (refuse_mapping, "rank 1 cannot map the memory of rank 0: cannot map shared memory: no memory"),
    ],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_cannot_share(run_on_ranks: RunOnRanks, world_size: int, hindrance: Hindrance, reason: str) -> None:
    assert_fell_back(run_on_ranks(world_size, train_in_spite_of, hindrance), reason)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in MEMFD_CREATE, reason="knows no system call numbers for this"
)
def test_a_container_that_forbids_shared_memory() -> None:
    reason = r"rank 1 cannot make shared memory: \[Errno 1\] Operation not permitted"
    assert_fell_back(run_fresh(2, train_in_spite_of, filter_memfd), reason)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run ranks of another user")
def test_ranks_of_two_users() -> None:
    reason = r"rank 1 cannot map the memory of rank 0: \[Errno 13\] Permission denied: '/proc/\d+/fd/\d+'"
    assert_fell_back(run_fresh(2, train_in_spite_of, become_another_user), reason)


def train_on_hosts(of_rank: Sequence[int]) -> Attempt:
    with hosts(of_rank):
        return attempt(transport="auto")


def test_hosts_of_one_rank_train(run_on_ranks: RunOnRanks) -> None:
    """Nothing is amiss there, so nothing is logged."""
    for got in run_on_ranks(2, train_on_hosts, [0, 1]):
        assert (got.transport, got.log) == ("pairwise", [])
