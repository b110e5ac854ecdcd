"""The numbers of the machine at hand, as far as one host shows them: `python -m zeroopt simulate --measure`.

What it cannot know, the network between hosts, is given. Each measurement takes the least of several turns, so that a busy moment does
not count.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from .. import ops
from ..planner.transformer import Transformer
from .machine import Machine
from .workload import count_operations

_TURNS = 5
_COPIED_BYTES = 64 * 2**20  # more than caches hold
_MESSAGE_BYTES = 16 * 2**20
_SMALL_MESSAGES = 200
_LAYERS, _WIDTH, _VOCABULARY, _TOKENS = 4, 384, 4096, 256


def measure(host_ranks: int, network_bandwidth: float, network_latency: float) -> Machine:
    """The machine at hand, as one host of ranks that compute on a core each. Starts two processes.

    Args:
        host_ranks: of each host.
        network_bandwidth, network_latency: bytes a second and seconds between hosts, which nobody here can measure.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        flops, memory = measure_flops(), measure_memory()
    finally:
        torch.set_num_threads(threads)
    messages = measure_messages()
    return Machine(
        host_ranks=host_ranks,
        flops=flops,
        memory_bandwidth=memory,
        cores=len(os.sched_getaffinity(0)),
        local_bandwidth=_MESSAGE_BYTES / messages.large_s,
        local_latency=messages.small_s,
        network_bandwidth=network_bandwidth,
        network_latency=network_latency,
        message_s=messages.small_processor_s,
        byte_s=messages.large_processor_s / _MESSAGE_BYTES,
    )


def measure_flops() -> float:
    """Operations a second of a small transformer's forward and backward, all that is not a product included."""
    model = Transformer(_LAYERS, _WIDTH, _VOCABULARY)
    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64)
    counted = count_operations(model, tokens)
    operations = sum(counted.by_param.values()) * (1 + counted.backward_factor)

    def forward_and_backward() -> None:
        model(tokens).backward()
        model.zero_grad()

    return operations / least_s(forward_and_backward)


def measure_memory() -> float:
    """Bytes a second, read and written."""
    source, target = torch.zeros(_COPIED_BYTES // 4), torch.zeros(_COPIED_BYTES // 4)
    return 2 * _COPIED_BYTES / least_s(lambda: ops.copy(source, target))


def least_s(run: Callable[[], None]) -> float:
    """Of some turns, after one that does not count."""
    run()
    return min(_seconds(run) for _ in range(_TURNS))


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Messages:
    """Of Gloo between two processes of this host, a message.

    Attributes:
        small_s, large_s: seconds.
        small_processor_s, large_processor_s: of one of the two ranks.
    """

    def __init__(self, small_s: float, small_processor_s: float, large_s: float, large_processor_s: float) -> None:
        self.small_s, self.small_processor_s = small_s, small_processor_s
        self.large_s, self.large_processor_s = large_s, large_processor_s


def measure_messages() -> Messages:
    """Starts two processes, which send each other messages in turn."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        here, there = context.Pipe(duplex=False)
        ranks = [
            context.Process(target=_exchange, args=(rank, str(Path(folder, "store")), there if rank == 0 else None))
            for rank in range(2)
        ]
        for rank in ranks:
            rank.start()
        there.close()
        figures: tuple[float, float, float, float] = here.recv()
        for rank in ranks:
            rank.join()
    return Messages(*figures)


def _exchange(rank: int, store: str, answer: Connection | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    small, large = torch.zeros(1), torch.zeros(_MESSAGE_BYTES // 4)
    figures = (*_back_and_forth(small, rank, _SMALL_MESSAGES), *_back_and_forth(large, rank, _TURNS))
    if answer is not None:
        answer.send(figures)
    dist.barrier()
    dist.destroy_process_group()


def _back_and_forth(tensor: torch.Tensor, rank: int, turns: int) -> tuple[float, float]:
    """Seconds and processor seconds of a message."""

    def turn() -> None:
        for sender in range(2):
            if sender == rank:
                dist.send(tensor, 1 - rank)
            else:
                dist.recv(tensor, 1 - rank)

    turn()
    start, processor = time.perf_counter(), time.process_time()
    for _ in range(turns):
        turn()
    messages = 2 * turns
    return (time.perf_counter() - start) / messages, (time.process_time() - processor) / messages
