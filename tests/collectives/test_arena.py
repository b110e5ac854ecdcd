"""Buffers cut from one piece of memory a rank: where they lie, how few mappings they take, and when their memory goes back."""

from __future__ import annotations

import gc
import os
from mmap import PAGESIZE
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transports import CPU, MEMORY, connect, resident_pages
from worker_pool import RunOnRanks

from zeroopt import _C
from zeroopt.collectives import ControlGroup
from zeroopt.collectives.arena import Arena, Returns, addresses_of_a_rank

BYTES = 64 * PAGESIZE


def lone_returns(index: int) -> Returns:
    memory = torch.zeros(_C.ShmBoard.bytes(dist.get_world_size()), dtype=torch.uint8)
    board = _C.ShmBoard(memory.data_ptr(), index, dist.get_world_size())
    return Returns(board, memoryview(memory.numpy()), index)


def cut_and_write(sizes: list[int]) -> list[list[list[int]]]:
    """Of each buffer, what this rank finds in the first and the last byte of every rank's when each has written its own."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    arena = Arena(ControlGroup(dist.group.WORLD), range(world_size), lone_returns(rank), 4 * PAGESIZE)
    buffers = [arena.cut(size, shared=number % 3 == 2) for number, size in enumerate(sizes)]
    assert all(int(memory.count_nonzero()) == 0 for of_rank in buffers for memory in of_rank)
    dist.barrier()
    for number, of_rank in enumerate(buffers):
        ends = of_rank[rank][:: max(1, len(of_rank[rank]) - 1)]
        if number % 3 != 2 or rank == 0:
            ends.fill_(10 * number + rank)
    dist.barrier()
    found = [[[int(memory[0]), int(memory[-1])] for memory in of_rank] for of_rank in buffers]
    dist.barrier()  # no ticket says that others still read
    return found


def test_all_cut_alike(run_on_ranks: RunOnRanks) -> None:
    """Five buffers from pieces of four pages: the third and the last take a piece of their own, which all ranks map together."""
    sizes = [1, 3 * PAGESIZE, 4 * PAGESIZE - 1, PAGESIZE, 9 * PAGESIZE]
    expected = [[[10 * number + (0 if number == 2 else rank)] * 2 for rank in range(3)] for number in range(5)]
    assert run_on_ranks(3, cut_and_write, sizes) == [expected] * 3


def pieces_mapped() -> int:
    return sum(MEMORY in line for line in Path("/proc/self/maps").read_text().splitlines())


def count_mappings() -> list[int]:
    gc.collect()
    counts = [pieces_mapped()]
    transport = connect("shm")
    for buffers in (1, 200):
        kept = [transport.allocate(1000, torch.float32, CPU, shared=number % 2 == 0) for number in range(buffers)]
        counts.append(pieces_mapped())
    del transport, kept
    counts.append(pieces_mapped())
    return counts


def test_a_mapping_a_rank(run_on_ranks: RunOnRanks) -> None:
    for before, one, many, after in run_on_ranks(3, count_mappings):
        assert one == many == before + 1 + 3  # the board, and a piece of each rank
        assert after == before


def meet_for_no_buffer() -> int:
    """Collectives that it takes to allocate a hundred buffers."""
    transport = connect("shm")
    with patch.object(ControlGroup, "_named", side_effect=AssertionError("a collective")) as named:
        for _ in range(100):
            transport.allocate(1000, torch.float32, CPU)
    return named.call_count


def test_no_rank_waits_for_another_to_allocate(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, meet_for_no_buffer) == [0, 0]


def place_of(memory: Tensor) -> tuple[int, int]:
    return memory.data_ptr(), memory.nbytes


def give_back(shared: bool) -> list[int]:
    """Pages of a full buffer while it is in use, when it has been freed, and some tickets after a view of it is gone."""
    transport = connect("shm")
    buffer = transport.allocate(BYTES, torch.uint8, CPU, shared=shared).fill_(1)
    place = place_of(buffer)
    transport.barrier()
    counts = [resident_pages(*place)]
    transport.free(buffer)
    view = buffer[5:]
    del buffer
    for _ in range(2):
        transport.barrier()
    counts.append(resident_pages(*place))
    assert int(view.sum()) == BYTES - 5
    transport.barrier()
    del view
    for _ in range(
        4
    ):  # the ticket after, that all have read it, what is posted then, and that the other rank has come so far
        transport.barrier()
    counts.append(resident_pages(*place))
    return counts


@pytest.mark.parametrize("shared", [False, True])
def test_memory_goes_back(run_on_ranks: RunOnRanks, shared: bool) -> None:
    pages = BYTES // PAGESIZE
    for counts in run_on_ranks(2, give_back, shared):
        assert counts == [pages, pages, 0]


def free_before_it_is_read() -> list[float]:
    """Rank 0 drops a bucket that rank 1 has yet to read, and goes on."""
    transport = connect("shm")
    bucket, other = (transport.allocate(2 * BYTES, torch.float32, CPU).fill_(1.0) for _ in range(2))
    total = torch.empty(BYTES)
    reduce = transport.start_reduce_scatter(bucket, total)
    if transport.slice_index == 0:
        dist.barrier()  # rank 1 has started, too, and reads nothing before rank 0 is through
        reduce.finish()
        transport.free(bucket)
        del bucket, reduce
        gc.collect()
        following = transport.start_reduce_scatter(other, torch.empty(BYTES))
        dist.barrier()
    else:
        dist.barrier()
        dist.barrier()
        reduce.finish()
        following = transport.start_reduce_scatter(other, torch.empty(BYTES))
    following.finish()
    return total.unique().tolist()


def test_memory_stays_for_who_has_yet_to_read_it(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, free_before_it_is_read) == [[2.0], [2.0]]


def drop_in_a_child() -> int:
    """What is left of a buffer when a forked child has dropped it."""
    transport = connect("shm")
    buffer = transport.allocate(BYTES, torch.uint8, CPU).fill_(1)
    transport.barrier()
    child = os.fork()
    if child == 0:
        transport.free(buffer)
        del transport, buffer
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    for _ in range(3):
        transport.barrier()
    return int(buffer.sum())


def test_a_child_gives_nothing_back(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, drop_in_a_child) == [BYTES] * 2


def drop_after_the_transport() -> list[int]:
    """Pages of a buffer, as those of another one keep its piece, when the transport is gone and when it is gone itself."""
    transport = connect("shm")
    buffer, kept = (transport.allocate(BYTES, torch.uint8, CPU).fill_(1) for _ in range(2))
    place = place_of(buffer)
    transport.barrier()
    dist.barrier()  # all have read the ticket of the one before
    del transport
    counts = [resident_pages(*place)]
    del buffer
    counts.append(resident_pages(*place))
    assert int(kept.sum()) == BYTES
    return counts


def test_memory_goes_back_when_the_transport_is_gone(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, drop_after_the_transport) == [[BYTES // PAGESIZE, 0]] * 2


def test_addresses_fit() -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * PAGESIZE
    assert addresses_of_a_rank(8) == memory
    assert addresses_of_a_rank(1 << 20) == 1 << 22
    with patch("resource.getrlimit", lambda _: (1 << 30, 1 << 30)):
        assert addresses_of_a_rank(4) == 1 << 25  # an eighth of what the process may have, by four
