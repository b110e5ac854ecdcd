"""Buckets lie in memory that the backend has allocated, or `wrap` says why they cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transports import CPU
from worker_pool import RankError, RunOnRanks

import zeroopt
from zeroopt.collectives import Transport, hierarchy, registered
from zeroopt.collectives.all_to_all import AllToAllTransport
from zeroopt.collectives.select import connect_transport


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


def taken_for_one_host(*_: Any) -> Transport:
    return AllToAllTransport(dist.group.WORLD, CPU)


def taken_for_many_hosts(*_: Any) -> Transport:
    return connect_transport(hierarchy(2), dist.group.WORLD, CPU)


def connect_over(backend: Any, taken: Callable[..., Transport] = taken_for_one_host, **options: bool) -> Any:
    """As if "auto" took what it takes for GPUs, over this backend."""
    with (
        patch("zeroopt.collectives.registered_memory.connect_transport", taken),
        patch.object(dist.ProcessGroup, "_get_backend", lambda group, device: backend),
    ):
        return registered(dist.group.WORLD, CPU, **options)


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


def name_over_many_hosts() -> tuple[str, bool]:
    backend = Allocator()
    transport = connect_over(backend, taken_for_many_hosts)
    return transport.name, transport.allocator is backend


def test_memory_of_one_communicator_is_not_for_levels(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, name_over_many_hosts) == [("torch", True)] * 2


class SymmetricMemory:
    """torch's module, as it is where there is such memory.

    Attributes:
        calls: of it, in their order: tensors that are taken, and then told to a group.
    """

    def __init__(self, source: str | None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._source = source

    def get_backend(self, device: torch.device) -> str | None:
        return self._source

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.calls.append(("empty", torch.full(size, 7, dtype=dtype, device=device)))
        return self.calls[-1][1]

    def rendezvous(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        self.calls.append(("rendezvous", (tensor, group)))

    def installed(self) -> Any:
        names = ("get_backend", "empty", "rendezvous")
        return patch.multiple(
            "torch.distributed._symmetric_memory", **{name: getattr(self, name) for name in names}, create=True
        )


def allocate_symmetric() -> bool:
    """Whether a buffer is zeros in symmetric memory of the group."""
    memory = SymmetricMemory("NCCL")
    with memory.installed():
        buffer = connect_over(object(), symmetric=True).allocate(8, torch.float32, CPU)
    (_, taken), (_, told) = memory.calls
    return buffer is taken is told[0] and told[1] is dist.group.WORLD and buffer.tolist() == [0.0] * 8


def test_buckets_lie_in_symmetric_memory_when_asked_for(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, allocate_symmetric) == [True] * 2


def symmetric_refusal(source: str | None) -> str:
    with SymmetricMemory(source).installed(), pytest.raises(zeroopt.ConfigError) as raised:
        connect_over(object(), symmetric=True)
    return str(raised.value)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (None, "from 'NCCL': there is none; call"),
        ("CUDA", "from 'NCCL': it is from 'CUDA', of which the collectives know nothing; call"),
    ],
)
def test_symmetric_memory_of_another_source_is_refused(
    run_on_ranks: RunOnRanks, source: str | None, found: str
) -> None:
    for message in run_on_ranks(2, symmetric_refusal, source):
        assert message.startswith("registered(symmetric=True) needs torch's symmetric memory on cpu, ")
        assert found in message


def refusal_as_it_is() -> str:
    with pytest.raises(zeroopt.ConfigError) as raised:
        connect_over(object(), symmetric=True)
    return str(raised.value)


def test_there_is_no_symmetric_memory_on_the_cpu(run_on_ranks: RunOnRanks) -> None:
    assert all("there is none" in message for message in run_on_ranks(2, refusal_as_it_is))


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
