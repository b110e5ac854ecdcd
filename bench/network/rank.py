"""What every rank does: it trains by one method, and looks at the clock and at its host's link."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from bench.model import make_model
from bench.network.methods import METHODS, Place

WARM_UP_STEPS = 2  # in which buffers are made, and the order of gradients is found out
VOCABULARY = 8192


@dataclass(frozen=True)
class Setting:
    """What all methods train.

    Attributes:
        tokens: of a sequence, of which each rank has one a step.
        layers, width: of a GPT.
        steps: of a window, within which nothing but training goes on; methods that do something every few steps do it as often
            in each.
        windows: that are measured.
    """

    num_hosts: int
    ranks_a_host: int
    tokens: int
    layers: int
    width: int
    steps: int
    windows: int

    @property
    def world_size(self) -> int:
        return self.num_hosts * self.ranks_a_host


class Window(NamedTuple):
    """Of some steps in a row, a step.

    Attributes:
        seconds: until all that they have started is through.
        sent, received: bytes that this host's link has counted, with the headers of TCP and IP.
        cpu_s: of this process.
        loss: of the last step.
    """

    seconds: float
    sent: float
    received: float
    cpu_s: float
    loss: float


def train(name: str, setting: Setting) -> list[Window]:
    """Train by a method. Collective."""
    method = METHODS[name]
    place = Place.find(setting.num_hosts, setting.ranks_a_host)
    torch.manual_seed(0)
    net = make_model(VOCABULARY, setting.tokens, setting.layers, setting.width)
    model, optimizer = method.prepare(net, torch.optim.AdamW(net.parameters(), fused=True), place)
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(VOCABULARY, (1, setting.tokens + 1), generator=generator)

    def run(steps: int) -> float:
        for _ in range(steps):
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for param in net.parameters():
            param.sum()  # is there
        return float(loss.item())

    steps = max(1, setting.steps // method.period) * method.period
    run(max(WARM_UP_STEPS, method.period))
    return [measure(lambda: run(steps), steps) for _ in range(setting.windows)]


def measure(run: Callable[[], float], steps: int) -> Window:
    """Of steps that all ranks begin together. Collective."""
    before = counted_bytes()
    cpu, start = time.process_time(), time.perf_counter()
    loss = run()
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    sent, received = (after - first for after, first in zip(counted_bytes(), before, strict=True))
    return Window(seconds / steps, sent / steps, received / steps, cpu_s / steps, loss)


def counted_bytes() -> tuple[int, int]:
    """Bytes that this host's link has sent and received so far, counted while no rank sends any. Collective."""
    dist.barrier()
    counts = read_counters(Path("/proc/net/dev").read_text(), os.environ["GLOO_SOCKET_IFNAME"])
    dist.barrier()
    return counts


def read_counters(text: str, device: str) -> tuple[int, int]:
    """Bytes sent and received, as /proc/net/dev has them."""
    for line in text.splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == device:
            received, sent = (int(counts.split()[column]) for column in (0, 8))
            return sent, received
    raise ValueError(f"there is no network device {device!r}")
