"""What one of ten thousand ranks tells the others beside buckets is what one of two hundred does: a fake process group counts it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zeroopt
from zeroopt.collectives import ControlGroup, PendingCollective, Transport, Wire
from zeroopt.collectives.pending import Done
from zeroopt.collectives.wire import PLAIN
from zeroopt.plan import buckets

LAYERS, WIDTH = 5, 12
FEW, MANY = 200, 10_000  # what tells who is where in its loop has 128 lanes at most
GATHERED_BYTES = 64  # of every other rank, that a rank hears: on which host it is, and a few numbers


class StandStill(Transport):
    """Of which nothing travels."""

    name = "none"

    def start_reduce_scatter(
        self, full: Tensor, out: Tensor, base: Tensor | None = None, *, wire: Wire = PLAIN, label: str = "a bucket"
    ) -> PendingCollective:
        wire.combine([self.own_slice(full)], out, base)
        return Done()

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        return Done()


class OutOfOrder(nn.Module):
    """Layers that run in another order than the one in which they are defined, so that buckets are planned anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


@contextmanager
def one_of(num_ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=num_ranks - 1, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Exchanged(TorchDispatchMode):
    """Counts what torch.distributed is given.

    Attributes:
        sent, received: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.received = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.partition(".")[0]
            out, *rest = args
            goes_in = rest[0] if "gather" in name else out
            self.sent += size_of(goes_in)
            self.received += size_of(out)
        return func(*args, **(kwargs or {}))


def size_of(tensors: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))


class Traffic(NamedTuple):
    """Bytes, and the buckets' order in the end: 1 where they have been planned anew."""

    sent: int
    received: int
    is_planned_anew: bool


def traffic_of(num_ranks: int, **options: Any) -> Traffic:
    """Of one rank that wraps a model and takes two steps. Buckets do not travel, nor do the values of the model."""

    def connect(group: dist.ProcessGroup, device: torch.device) -> Transport:
        return StandStill(group)

    torch.manual_seed(0)
    net = OutOfOrder()
    # However much padding there is: else a small model would lie in one bucket, of which there is nothing to plan anew.
    with one_of(num_ranks), Exchanged() as exchanged, patch.object(buckets, "PADDING_SHARE", math.inf):
        optimizer = torch.optim.AdamW(net.parameters())
        model, wrapped = zeroopt.wrap(
            net, optimizer, bucket_mb=1e-3, transport=connect, sync_module_states=False, max_grad_norm=1.0, **options
        )
        before = [managed.name for bucket in wrapped._trained.buckets for managed in bucket.params]
        for _ in range(2):
            model(torch.ones(1, WIDTH)).sum().backward()
            wrapped.step()
            wrapped.zero_grad()
        after = [managed.name for bucket in wrapped._trained.buckets for managed in bucket.params]
    return Traffic(exchanged.sent, exchanged.received, before != after)


@pytest.mark.parametrize(
    "options",
    [{"stage": 1}, {"stage": 2}, {"stage": 1, "param_dtype": torch.bfloat16, "cast_inputs": True}, {"check_every": 1}],
    ids=str,
)
def test_what_ranks_tell_each_other_does_not_grow(options: dict[str, Any]) -> None:
    few, many = (traffic_of(num_ranks, **options) for num_ranks in (FEW, MANY))
    assert few.is_planned_anew and many.is_planned_anew
    assert 0 < many.sent == few.sent
    assert many.received - few.received <= GATHERED_BYTES * (MANY - FEW)


def tell(control: ControlGroup) -> list[Tensor]:
    return [control.gather(torch.tensor([1.0, 2.0]), "test"), control.largest(torch.ones(3), "test")]


def test_what_is_told_is_counted() -> None:
    """Or the test above could not fail."""
    with one_of(LAYERS), Exchanged() as exchanged:
        tell(ControlGroup(dist.group.WORLD))
    assert (exchanged.sent, exchanged.received) == (8 + 12, 8 * LAYERS + 12)
