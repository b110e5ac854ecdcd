"""One copy of the parameters for all ranks of a host: nobody reads what is half written, and nobody writes twice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import MODELS, OPTIMIZERS, batch, build, loss_of, optimizer_for, snapshot, train_all
from worker_pool import RunOnRanks

import zeroopt

SHARED = {"stage": 2, "share_parameters": True, "bucket_mb": 0.003}
PRIVATE = {**SHARED, "share_parameters": False}


def data_addresses() -> tuple[bool, list[int], list[int]]:
    """Whether a write of rank 0 is seen here, and the inodes behind the parameters."""
    net = nn.Linear(16, 16)
    model, _ = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), **SHARED)
    with model.write_parameters() as mine:
        if mine:
            net.weight.data.fill_(float(dist.get_rank() + 5))
    seen = bool((net.weight == 5).all())
    return seen, inodes_at(net.weight.data_ptr()), [mine]


def inodes_at(address: int) -> list[int]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        begin, end = (int(limit, 16) for limit in span.split("-"))
        if begin <= address < end:
            return [int(inode)]
    return []


def test_parameters_are_the_same_memory(run_on_ranks: RunOnRanks) -> None:
    (seen, inodes, first), *others = run_on_ranks(3, data_addresses)
    assert seen and first == [True]
    for other_seen, other_inodes, mine in others:
        assert other_seen and other_inodes == inodes and mine == [False]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_training_equals_that_of_private_copies(run_on_ranks: RunOnRanks, world_size: int, model: str) -> None:
    variants = [PRIVATE, SHARED, {**SHARED, "stage": 1}, {**SHARED, "overlap": False}]
    for private, *shared in run_on_ranks(world_size, train_all, model, "adamw", variants):
        for history in shared:
            for step, expected in zip(history, private, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(step, expected, strict=True))


@pytest.mark.parametrize("optimizer", ["sgd_nesterov", "adagrad", "own"])
def test_own_steps_of_optimizers(run_on_ranks: RunOnRanks, optimizer: str) -> None:
    for private, shared in run_on_ranks(2, train_all, "mlp", optimizer, [PRIVATE, {**SHARED, "fused": False}]):
        for step, expected in zip(shared, private, strict=True):
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(step, expected, strict=True))


def train_16_bit(dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)).to(dtype)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=0.01, eps=1e-4), **options)
    for _ in range(3):
        x = torch.randn(4, 24, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters(run_on_ranks: RunOnRanks, dtype: torch.dtype) -> None:
    for shared, private in zip(
        run_on_ranks(2, train_16_bit, dtype, SHARED), run_on_ranks(2, train_16_bit, dtype, PRIVATE), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(shared, private, strict=True))


class Checkpointed(nn.Module):
    """Runs its layers again during backward, and uses one of them twice."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for layer in (*self.layers, self.layers[0]):
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=self.reentrant)
        return x


def read_late(how: str, options: dict[str, Any]) -> list[list[Tensor]]:
    """Parameters are read after their gradient is ready, by a rank that is slower than the others."""
    torch.manual_seed(0)
    net = Checkpointed(reentrant=False)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=0.05), **options)
    slow = dist.get_rank() == 1
    history = []
    for number in range(3):
        generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
        x = torch.randn(4, 24, generator=generator)
        loss = model(x).square().mean()
        if how == "retain_graph":
            loss.backward(retain_graph=True)
            time.sleep(0.02 * slow)
            loss.backward()
        else:
            loss.backward()
        if how == "evaluation before the step":
            time.sleep(0.02 * slow)  # the others are in step() by now
            with torch.no_grad():
                outputs = [net(torch.ones(2, 24)) for _ in range(3)]
            history.append([*outputs, *snapshot(net)])
        optimizer.step()
        if how == "evaluation after the step" and slow:
            with torch.no_grad():
                history.append([net(torch.ones(2, 24)), *snapshot(net)])
        history.append(snapshot(net))
        optimizer.zero_grad()
    return history


@pytest.mark.parametrize(
    "how", ["checkpointing", "retain_graph", "evaluation before the step", "evaluation after the step"]
)
def test_nobody_writes_what_another_rank_still_reads(run_on_ranks: RunOnRanks, how: str) -> None:
    for shared, private in zip(
        run_on_ranks(3, read_late, how, SHARED), run_on_ranks(3, read_late, how, PRIVATE), strict=True
    ):
        for one, other in zip(shared, private, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def load_different_values(direct: bool) -> tuple[list[Tensor], bool, int]:
    """Load a state dict, counting how often this rank writes a parameter."""
    net = build("conv")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), **SHARED)
    loss_of(model(batch("conv", 0))).backward()
    optimizer.step()
    torch.manual_seed(99)
    saved = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in build("conv").state_dict().items()}
    versions = [p._version for p in net.parameters()]
    (net if direct else model).load_state_dict(saved)
    writes = sum(p._version > before for p, before in zip(net.parameters(), versions, strict=True))
    equal = all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    loss_of(model(batch("conv", 1))).backward()
    optimizer.step()
    return snapshot(net), equal, writes


def test_load_state_dict_writes_once_a_host(run_on_ranks: RunOnRanks) -> None:
    (first, equal, writes), (second, other_equal, other_writes) = run_on_ranks(2, load_different_values, False)
    assert equal and other_equal
    trained = sum(1 for _ in build("conv").parameters()) - 1  # one is frozen, and so private
    assert writes >= trained
    assert other_writes <= 1
    num_params = trained + 1
    assert all(torch.equal(a, b) for a, b in zip(first[:num_params], second[:num_params], strict=True))


def test_the_bare_model_can_be_loaded_too(run_on_ranks: RunOnRanks) -> None:
    (first, equal, _), (second, other_equal, _) = run_on_ranks(2, load_different_values, True)
    assert equal and other_equal
    assert torch.equal(first[0], second[0])


def initial_values(sync: bool) -> Tensor:
    torch.manual_seed(dist.get_rank())
    net = nn.Linear(8, 8)
    zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), share_parameters=True, sync_module_states=sync)
    return net.weight.detach().clone()


@pytest.mark.parametrize("sync", [True, False])
def test_all_start_from_the_first_rank_of_the_host(run_on_ranks: RunOnRanks, sync: bool) -> None:
    torch.manual_seed(0)
    expected = nn.Linear(8, 8).weight
    for weight in run_on_ranks(3, initial_values, sync):
        assert torch.equal(weight, expected)


def scale_in_turns(shared: bool) -> Tensor:
    """The idiom for an in-place change, which is right whether parameters are shared or not."""
    torch.manual_seed(0)
    net = nn.Linear(8, 8)
    model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), share_parameters=shared)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    with model.write_parameters() as mine, torch.no_grad():
        if mine:
            net.weight.mul_(0.5)
    return net.weight.detach().clone()


def test_write_parameters(run_on_ranks: RunOnRanks) -> None:
    private, shared = run_on_ranks(3, scale_in_turns, False), run_on_ranks(3, scale_in_turns, True)
    for weight in (*private, *shared):
        assert torch.equal(weight, private[0])


def test_every_optimizer_steps_shared_parameters_in_place(run_on_ranks: RunOnRanks) -> None:
    for name in OPTIMIZERS:
        first, second = run_on_ranks(2, train_all, "lm", name, [SHARED], 2)
        assert all(torch.equal(a, b) for a, b in zip(first[0][-1], second[0][-1], strict=True)), name
