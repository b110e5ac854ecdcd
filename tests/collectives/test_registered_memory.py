"""Buckets lie in memory that the backend has allocated, or `wrap` says why they cannot."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transports import CPU
from worker_pool import RankError, RunOnRanks

import zeroopt
from zeroopt.collectives import registered
from zeroopt.collectives.all_to_all import AllToAllTransport


class Allocator:
    """A backend that allocates, and may not for this device.

    Attributes:
        made: the tensors.
    """

    def __init__(self, offers: bool = True) -> None:
        self.made: list[Tensor] = []
        self._offers = offers

    def name(self) -> str:
        return "a backend"

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return self._offers

    def allocate_tensor(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.made.append(torch.full((size,), 7, dtype=dtype, device=device))
        return self.made[-1]


def connect_over(backend: Any) -> Any:
    """As if "auto" took what it takes for GPUs, over this backend."""
    with (
        patch(
            "zeroopt.collectives.registered_memory.connect_transport",
            lambda *_: AllToAllTransport(dist.group.WORLD, CPU),
        ),
        patch.object(dist.ProcessGroup, "_get_backend", lambda group, device: backend),
    ):
        return registered(dist.group.WORLD, CPU)


def allocate() -> bool:
    """Whether a buffer is zeros in the backend's memory, and collectives take it."""
    backend = Allocator()
    transport = connect_over(backend)
    buffer = transport.allocate(8, torch.float32, CPU)
    assert buffer.tolist() == [0.0] * 8
    transport.own_slice(buffer).fill_(1.0)
    transport.start_all_gather(buffer).finish()
    return buffer is backend.made[0] and bool(buffer.eq(1.0).all())


def test_buckets_come_from_the_backend(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, allocate) == [True] * 2


def refusal(backend: Any) -> str:
    with pytest.raises(zeroopt.ConfigError) as raised:
        connect_over(backend)
    return str(raised.value)


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        (Allocator(offers=False), "backend 'a backend' does not here"),
        (object(), f"torch {torch.__version__} does not"),  # which knows nothing of it
    ],
)
def test_a_backend_that_does_not_is_told(run_on_ranks: RunOnRanks, backend: Any, text: str) -> None:
    for message in run_on_ranks(2, refusal, backend):
        assert message.startswith(
            "transport=registered needs torch 2.8 or newer and a backend that allocates memory for cpu"
        )
        assert text in message and message.endswith("use transport='auto'")


def wrap_registered() -> str:
    net = nn.Linear(4, 4)
    model, _ = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), transport=registered)
    return str(model.replica.transport.name)


def test_parameters_on_the_cpu_are_refused(run_on_ranks: RunOnRanks) -> None:
    text = "transport=registered is for parameters on a GPU, got cpu, for which transport='auto' takes 'shm'"
    assert run_on_ranks.outcomes(2, wrap_registered) == [RankError("ConfigError", text)] * 2


def test_a_rank_alone_has_nothing_to_register(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(1, wrap_registered) == ["single"]
