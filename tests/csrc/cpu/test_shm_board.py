"""The board in shared memory: counters that only grow, sleepers that are always woken, locks that end with their process."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worker_pool import RunOnRanks

from zeroopt import _C
from zeroopt.collectives import ControlGroup
from zeroopt.collectives.shared_memory import OpenMemory, map_together

CAPACITY, NEVER = _C.ShmBoard.CAPACITY, _C.ShmBoard.NEVER
LONG_S = 120.0  # a wait that takes this long has missed its wake-up
PAUSES_S = [0.0, 0.0, 0.0, 1e-5, 1e-4, 2e-3]


def new_boards(world_size: int) -> tuple[list[_C.ShmBoard], Tensor]:
    """One for each rank, in memory of this process, and the memory."""
    memory = torch.zeros(_C.ShmBoard.bytes(world_size), dtype=torch.uint8)
    return [_C.ShmBoard(memory.data_ptr(), rank, world_size) for rank in range(world_size)], memory


def ticket(number: int) -> _C.Ticket:
    return _C.Ticket(number % 5, 3 * number, number % 7)


def play(board: _C.ShmBoard, rank: int, world_size: int, num_tickets: int, seed: int) -> None:
    """Post, wait and read as one rank, in a random rhythm. Fails on a missed wake-up, or on a ticket that has changed
    before it was read."""
    pace = random.Random(f"{seed} {rank}")
    posted = read = 0
    while read < num_tickets:
        time.sleep(pace.choice(PAUSES_S))
        may_post = posted < num_tickets and posted < read + CAPACITY
        if may_post and (posted == read or pace.random() < 0.6):
            assert board.wait(NEVER, posted - CAPACITY + 1, LONG_S)
            assert board.post(ticket(posted)) == posted
            posted += 1
        else:
            assert board.wait(read + 1, NEVER, LONG_S)
            for peer in range(world_size):
                got, expected = board.ticket(peer, read), ticket(read)
                assert (got.kind, got.bytes, got.buffer) == (expected.kind, expected.bytes, expected.buffer)
            read += 1
            board.mark_read(read)
    assert board.wait(NEVER, num_tickets, LONG_S)


def watch(board: _C.ShmBoard, done: threading.Event) -> None:
    """Fails when a counter goes back, or a rank reads what others have not posted."""
    posted, read = board.posted(), board.read()
    while not done.is_set():
        new_read, new_posted = board.read(), board.posted()
        assert all(new >= old for new, old in zip(new_posted, posted, strict=True))
        assert all(new >= old for new, old in zip(new_read, read, strict=True))
        assert max(new_read) <= min(new_posted) + 1  # a rank is counted a moment before its own counter tells
        assert not any(board.left())
        posted, read = new_posted, new_read
        time.sleep(1e-4)


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 2**32))
@settings(max_examples=30)
def test_threads_at_random(world_size: int, num_tickets: int, seed: int) -> None:
    boards, _memory = new_boards(world_size)
    done = threading.Event()
    with ThreadPoolExecutor(world_size + 1) as threads:
        watcher = threads.submit(watch, boards[0], done)
        ranks = [threads.submit(play, board, rank, world_size, num_tickets, seed) for rank, board in enumerate(boards)]
        try:
            for running in ranks:
                running.result()
        finally:
            done.set()
        watcher.result()


def play_on_ranks(num_tickets: int, seed: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    (memory, *_), descriptor = map_together(
        ControlGroup(dist.group.WORLD), range(world_size), _C.ShmBoard.bytes(world_size), one_for_all=True
    )
    os.close(descriptor)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    play(_C.ShmBoard(address, rank, world_size), rank, world_size, num_tickets, seed)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_at_random(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, play_on_ranks, 3 * CAPACITY, seed=world_size)  # several times round the ring of tickets


def seconds_of(call: Callable[[], bool]) -> tuple[bool, float]:
    begin = time.monotonic()
    return call(), time.monotonic() - begin


@given(st.floats(0, 0.05))
@settings(max_examples=20)
def test_wait_returns_within_its_time(seconds: float) -> None:
    boards, _memory = new_boards(2)
    boards[0].post(ticket(0))
    arrived, took = seconds_of(partial(boards[0].wait, 1, NEVER, seconds))
    assert not arrived
    assert seconds <= took < LONG_S


def test_wait_returns_within_its_time_while_the_bell_rings() -> None:
    boards, _memory = new_boards(3)
    done = threading.Event()

    def ring() -> None:
        for number in count():
            for board in boards:
                board.post(ticket(number))
            for board in boards:
                board.mark_read(number + 1)
            if done.wait(1e-4):
                break

    with ThreadPoolExecutor(1) as threads:
        ringing = threads.submit(ring)
        arrived, took = seconds_of(partial(boards[0].wait, 10**9, NEVER, 0.1))
        done.set()
        ringing.result()
    assert not arrived
    assert 0.1 <= took < LONG_S


def test_wait_takes_what_comes_first() -> None:
    boards, _memory = new_boards(2)
    for board in boards:
        board.post(ticket(0))
    assert boards[0].wait(1, 1, 0.0)  # all have posted
    assert not boards[0].wait(2, 1, 0.0)
    for board in boards:
        board.mark_read(1)
    assert boards[0].wait(2, 1, 0.0)  # all have read


def sleep_until(event: Callable[[_C.ShmBoard], object]) -> tuple[bool, float]:
    """Rank 0 waits for both ranks' first ticket; rank 1 lets it fall asleep and does something."""
    boards, _memory = new_boards(2)
    boards[0].post(ticket(0))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(seconds_of, partial(boards[0].wait, 1, NEVER, LONG_S))
        time.sleep(0.05)
        event(boards[1])
        return waiting.result()


def test_a_post_wakes() -> None:
    arrived, took = sleep_until(lambda board: board.post(ticket(0)))
    assert arrived
    assert took < LONG_S / 2


def test_leaving_ends_waits() -> None:
    arrived, took = sleep_until(lambda board: board.leave())
    assert not arrived
    assert took < LONG_S / 2


def test_what_a_rank_did_before_it_left_counts() -> None:
    boards, _memory = new_boards(2)
    for board in boards:
        board.post(ticket(0))
    boards[1].leave()
    assert boards[0].left() == [False, True]
    assert boards[0].wait(1, NEVER, LONG_S)
    arrived, took = seconds_of(partial(boards[0].wait, 2, NEVER, LONG_S))
    assert not arrived
    assert took < LONG_S / 2


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_ticket_that_is_still_to_be_read_stays(world_size: int) -> None:
    boards, _memory = new_boards(world_size)
    for number in range(CAPACITY):
        boards[0].post(ticket(number))
    for slowest in range(world_size):
        with pytest.raises(RuntimeError, match="still to be read"):
            boards[0].post(ticket(CAPACITY))
        assert boards[0].posted()[0] == CAPACITY
        assert boards[0].ticket(0, 0).bytes == 0
        boards[slowest].mark_read(1)
    assert boards[0].post(ticket(CAPACITY)) == CAPACITY
    with pytest.raises(RuntimeError, match="still to be read"):
        boards[0].post(ticket(CAPACITY + 1))


def test_several_tickets_are_read_at_once() -> None:
    boards, _memory = new_boards(3)
    for number in range(CAPACITY + 5):
        if number % 7 == 0:
            for board in boards:
                board.mark_read(number)
        for board in boards:
            assert board.post(ticket(number)) == number
    assert boards[0].wait(CAPACITY + 5, NEVER, 0.0)
    assert not boards[0].wait(CAPACITY + 6, NEVER, 0.0)
    for board in boards[:-1]:
        board.mark_read(CAPACITY + 5)
        assert not boards[0].wait(NEVER, CAPACITY + 5, 0.0)
    boards[-1].mark_read(CAPACITY + 4)
    assert boards[0].wait(NEVER, CAPACITY + 4, 0.0)
    assert not boards[0].wait(NEVER, CAPACITY + 5, 0.0)


@pytest.mark.parametrize("rank", [-1, 2])
def test_there_is_a_lane_for_each_rank_only(rank: int) -> None:
    memory = torch.zeros(_C.ShmBoard.bytes(2), dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected a rank below world_size"):
        _C.ShmBoard(memory.data_ptr(), rank, 2)


def in_a_child(call: Callable[[], bool]) -> bool:
    """What a call gives in a forked process, which ends with it."""
    child = os.fork()
    if child == 0:
        os._exit(int(call()))
    return bool(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def hold_locks() -> list[bool]:
    """Locks of this process, as children see them, and the other way round."""
    descriptor = OpenMemory(64).fd
    _C.hold_rank_lock(descriptor, 0)
    is_held = partial(_C.rank_lock_is_held, descriptor)

    def hold_another() -> bool:
        _C.hold_rank_lock(descriptor, 1)
        return is_held(0)

    held = [
        in_a_child(partial(is_held, 0)),
        in_a_child(partial(is_held, 1)),
        in_a_child(hold_another),
        is_held(1),  # by nobody any more
        in_a_child(partial(is_held, 0)),  # the children had copies of the descriptor and have closed them
    ]
    os.close(descriptor)
    return held


def test_locks_end_with_their_process(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(1, hold_locks) == [[True, False, True, False, True]]


@pytest.mark.slow
def test_threads_do_not_race(tmp_path: Path) -> None:
    """Ranks as threads in C++, where Python's lock cannot hide a race, under a ThreadSanitizer."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    here, program = Path(__file__).parent, tmp_path / "board_threads"
    csrc = here.parents[2] / "csrc"
    sources = [here / "board_threads.cpp", csrc / "cpu" / "shm_board.cpp"]
    command = [compiler, "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{csrc}", *sources]
    compiled = subprocess.run([*command, "-o", program], capture_output=True, text=True, check=False)
    if compiled.returncode and "tsan" in compiled.stderr:
        pytest.skip("the compiler comes without a ThreadSanitizer")
    assert compiled.returncode == 0, compiled.stderr
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    run = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("addresses of this kernel are laid out as its ThreadSanitizer cannot have them")
    assert run.returncode == 0, run.stderr


RELACY = next((path for path in map(Path, ("/usr/include", "/usr/local/include")) if (path / "relacy").is_dir()), None)
ACQUIRE, RELAXED = "std::memory_order_acquire", "std::memory_order_relaxed"
WEAKENED = {
    "a count that orders nothing": (("count.fetch_add(1) + 1", f"count.fetch_add(1, {RELAXED}) + 1"),),
    "a ticket whose parts are not acquired": tuple(
        (f"{part}.load({ACQUIRE})", f"{part}.load({RELAXED})") for part in ("kind", "bytes", "buffer")
    ),
    "a bell that is heard too late": (("head_->bell.load()", f"head_->bell.load({RELAXED})"),),
}
"""Faults that x86-64 hides, as changes of the source."""


def run_model(folder: Path, changes: Iterable[tuple[str, str]], iterations: int) -> subprocess.CompletedProcess[str]:
    """The board's source, with changes, under board_model.cpp."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or RELACY is None:
        pytest.skip("there is no C++ compiler, or no Relacy (Debian: relacy-dev)")
    here, program = Path(__file__).parent, folder / "board_model"
    csrc = here.parents[2] / "csrc"
    (folder / "cpu").mkdir()
    for name in ("shm_board.h", "shm_board.cpp"):
        text = (csrc / "cpu" / name).read_text()
        for before, after in (("kCapacity = 256;", "kCapacity = 2;"), *changes):
            text = text.replace(before, after)
        (folder / "cpu" / name).write_text(text)
    # Relacy has an operator delete of its own, for which sizes are unknown; its own warnings are not ours.
    options = ["-std=c++17", "-O1", "-w", "-fno-access-control", "-fno-sized-deallocation", f"-I{folder}", f"-I{csrc}"]
    command = [compiler, *options, here / "board_model.cpp", "-o", program]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return subprocess.run([program, str(iterations)], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_weakly_ordered_memory(tmp_path: Path) -> None:
    """In whatever order C++'s memory model lets others see what a rank writes, as Arm's processors do and x86-64's do not."""
    result = run_model(tmp_path, (), 50_000)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", WEAKENED)
def test_a_fault_that_only_weak_order_shows_is_found(fault: str, tmp_path: Path) -> None:
    result = run_model(tmp_path, WEAKENED[fault], 50_000)
    assert result.returncode == 1, result.stdout
    assert any(found in result.stdout for found in ("DATA RACE", "ASSERT FAILED", "DEADLOCK")), result.stdout
