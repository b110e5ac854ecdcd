"""What a transport is asked for besides parameters: bounded by the size of a bucket, however many ranks there are.

One of many ranks is in this process. The others are made up: they say what this one says, and nothing comes from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import zeroopt
from zeroopt.collectives import PendingCollective, Transport, Wire
from zeroopt.collectives.pending import Done
from zeroopt.collectives.wire import PLAIN

WIDTH, LAYERS = 256, 12
LAYER_BYTES = 4 * WIDTH * (WIDTH + 1)
BUCKET_BYTES = 3 * LAYER_BYTES
SLACK_BYTES = 4096  # flags that travel with gradients
PADDING = 64  # elements of a slice, at most, so that the next one begins where memory is aligned


class Recording(Transport):
    """Moves nothing.

    Attributes:
        held: bytes of the buffers that have been asked for and not given up, by address.
        most: of them together, at any moment.
    """

    name = "recording"

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.held: dict[int, int] = {}
        self.most = 0

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device, *, shared: bool = False) -> Tensor:
        buffer = super().allocate(numel, dtype, device, shared=shared)
        self.held[buffer.data_ptr()] = buffer.nbytes
        self.most = max(self.most, sum(self.held.values()))
        return buffer

    def free(self, buffer: Tensor) -> None:
        del self.held[buffer.data_ptr()]

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        wire.combine([self.own_slice(full)], out, base)
        return Done()

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        return Done()


@contextmanager
def one_of(num_ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=num_ranks - 1, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class OutOfOrder(nn.Module):
    """Layers that run in another order than the one in which they are defined, so that buckets are planned anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for index in torch.randperm(LAYERS, generator=torch.Generator().manual_seed(0)).tolist():
            x = self.layers[index](x)
        return x


def asked_for(net: nn.Module, x: Tensor, num_ranks: int, **options: Any) -> Recording:
    """By wrapping and some steps."""
    made: list[Recording] = []

    def connect(group: dist.ProcessGroup, device: torch.device) -> Transport:
        made.append(Recording(group))
        return made[0]

    with one_of(num_ranks):
        optimizer = torch.optim.AdamW(net.parameters())
        bucket_mb = BUCKET_BYTES / 2**20
        model, wrapped = zeroopt.wrap(net, optimizer, bucket_mb=bucket_mb, transport=connect, **options)
        for _ in range(3):
            model(x).sum().backward()
            wrapped.step()
            wrapped.zero_grad()
    return made[0]


POOL = 2  # buckets' gradients that fill and travel
MOVING = 1  # through which state moves when buckets are planned anew


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
@pytest.mark.parametrize(
    ("options", "pool"),
    [
        ({"stage": 2}, POOL),
        ({"stage": 2, "bucket_buffers": 3}, 3),
        ({"stage": 2, "overlap": False}, 1),
        ({"stage": 2, "reduce_dtype": torch.bfloat16}, POOL),
        ({"stage": 1}, LAYERS * LAYER_BYTES / BUCKET_BYTES),  # whole gradients
    ],
)
def test_buffers_are_bounded_whatever_the_number_of_ranks(num_ranks: int, options: dict[str, Any], pool: float) -> None:
    net = OutOfOrder()
    transport = asked_for(net, torch.randn(2, WIDTH), num_ranks, **options)
    num_buckets = LAYERS * LAYER_BYTES // BUCKET_BYTES
    padded_bytes = BUCKET_BYTES + 4 * PADDING * num_ranks
    parameters, left = num_buckets * padded_bytes, sum(transport.held.values())
    print(f"{left / BUCKET_BYTES:.3f} buckets, {transport.most / BUCKET_BYTES:.3f} at most")
    assert num_buckets * BUCKET_BYTES <= left <= parameters + pool * padded_bytes + SLACK_BYTES
    assert transport.most <= parameters + (pool + MOVING) * padded_bytes + SLACK_BYTES


def test_a_large_parameter_makes_no_buffer_larger() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * BUCKET_BYTES // (4 * WIDTH), bias=False))
    transport = asked_for(net, torch.randn(2, WIDTH), 8)
    parameters = sum(param.numel() * 4 for param in net.parameters())
    padding = 4 * PADDING * 8 * len(transport.held)
    assert transport.most <= parameters + padding + (POOL + MOVING) * BUCKET_BYTES + SLACK_BYTES
