"""The numbers of the machine at hand, as far as one host shows them: `python -m zeroopt simulate --measure`.

As many processes as there are cores, for that is how ranks compute: beside each other, with one memory. What they cannot know, the network
between hosts, is given. Each measurement is the median of several turns.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, pstdev

import torch
import torch.distributed as dist
from torch import nn

from .. import ops
from ..planner.transformer import Transformer
from ..wrap import wrap
from .machine import Machine
from .workload import count_operations

_TURNS = 15
_COPIED_BYTES = 64 * 2**20  # more than caches hold
_MESSAGE_BYTES = 16 * 2**20
_SMALL_MESSAGES = 200
_BUCKETS = 32
_LAYERS, _WIDTH, _VOCABULARY, _TOKENS = 4, 384, 4096, 256


@dataclass(frozen=True)
class Figures:
    """What one of the processes has measured: see `Machine`.

    Attributes:
        small_s, large_s: seconds of a message between two processes of this host.
        small_processor_s, large_processor_s: processor seconds of one of the two.
    """

    flops: float
    noise: float
    memory_bandwidth: float
    small_s: float
    small_processor_s: float
    large_s: float
    large_processor_s: float
    bucket_s: float


def measure(host_ranks: int, network_bandwidth: float, network_latency: float) -> Machine:
    """The machine at hand, as one host of ranks that compute on a core each. Starts a process for each core.

    Args:
        host_ranks: of each host.
        network_bandwidth, network_latency: bytes a second and seconds between hosts, which nobody here can measure.
    """
    cores = len(os.sched_getaffinity(0))
    figures = _measure_together(max(2, cores))
    return Machine(
        host_ranks=host_ranks,
        flops=figures.flops,
        memory_bandwidth=figures.memory_bandwidth,
        cores=cores,
        local_bandwidth=_MESSAGE_BYTES / figures.large_s,
        local_latency=figures.small_s,
        network_bandwidth=network_bandwidth,
        network_latency=network_latency,
        message_s=figures.small_processor_s,
        byte_s=figures.large_processor_s / _MESSAGE_BYTES,
        bucket_s=figures.bucket_s,
        noise=figures.noise,
    )


def _measure_together(size: int) -> Figures:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        here, there = context.Pipe(duplex=False)
        store = str(Path(folder, "store"))
        ranks = [
            context.Process(target=_rank, args=(rank, size, store, there if rank == 0 else None))
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        there.close()  # so that the pipe ends when the process does
        figures: Figures = here.recv()
        for rank in ranks:
            rank.join()
    return figures


def _rank(rank: int, size: int, store: str, answer: Connection | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    flops, noise = measure_flops()
    memory = measure_memory()
    small = _back_and_forth(torch.zeros(1, device="cpu"), rank, _SMALL_MESSAGES)
    large = _back_and_forth(torch.zeros(_MESSAGE_BYTES // 4, device="cpu"), rank, _TURNS)
    figures = Figures(flops, noise, memory, *small, *large, measure_bucket())
    if answer is not None:
        answer.send(figures)
    dist.barrier()
    dist.destroy_process_group()


def measure_flops() -> tuple[float, float]:
    """Operations a second of a small transformer's forward and backward, all that is not a product included; and the standard deviation of
    the logarithm of its time. Collective, as all of these are."""
    model = Transformer(_LAYERS, _WIDTH, _VOCABULARY)
    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64, device="cpu")
    counted = count_operations(model, tokens)
    operations = sum(counted.by_param.values()) * (1 + counted.backward_factor)

    def forward_and_backward() -> None:
        model(tokens).backward()
        model.zero_grad()

    turns = seconds_of(forward_and_backward)
    return operations / median(turns), pstdev(map(log, turns))


def measure_memory() -> float:
    """Bytes a second, read and written."""
    source, target = torch.zeros(_COPIED_BYTES // 4, device="cpu"), torch.zeros(_COPIED_BYTES // 4, device="cpu")
    return 2 * _COPIED_BYTES / median(seconds_of(lambda: ops.copy(source, target)))


def measure_bucket() -> float:
    """Seconds of a step for each bucket, of buckets with next to nothing in them."""
    many, one = (median(seconds_of(_make_step(bucket_mb))) for bucket_mb in (1e-4, 1.0))
    return max(0.0, (many - one) / (_BUCKETS - 1))


def _make_step(bucket_mb: float) -> Callable[[], None]:
    """Of layers that lie in a bucket each, or all in one."""
    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(_BUCKETS)))
    model, optimizer = wrap(net, torch.optim.AdamW(net.parameters()), stage=1, bucket_mb=bucket_mb)
    x = torch.zeros(1, 8, device="cpu")

    def step() -> None:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def seconds_of(run: Callable[[], None]) -> list[float]:
    """Of some turns that all processes begin together, after one that does not count."""
    run()
    dist.barrier()
    return [_seconds(run) for _ in range(_TURNS)]


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _back_and_forth(tensor: torch.Tensor, rank: int, turns: int) -> tuple[float, float]:
    """Seconds and processor seconds of a message between the first two processes, while the others wait."""

    def turn() -> None:
        for sender in range(2):
            if sender == rank:
                dist.send(tensor, 1 - rank)
            else:
                dist.recv(tensor, 1 - rank)

    if rank < 2:
        turn()
    dist.barrier()
    start, processor = time.perf_counter(), time.process_time()
    for _ in range(turns if rank < 2 else 0):
        turn()
    messages = 2 * turns
    return (time.perf_counter() - start) / messages, (time.process_time() - processor) / messages
