"""What waits for a GPU, in `tests/training/test_on_gpu.py` and `bench/gpu`, runs on pretend devices first."""

from __future__ import annotations

from threading import Lock
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from training import build
from without_kernels import built_without_cuda
from worker_pool import RunOnRanks

from bench.gpu.methods import METHODS, SHAPES, Shape, sums_here, sums_in_levels, sums_of_backend
from bench.gpu.training_step import Loop as StepLoop
from tests.training import test_on_gpu
from tests.training.test_on_gpu import (
    LOOPS,
    STAGES,
    TIERS,
    sums_in_registered_memory,
    train_by_graph,
    train_elementwise,
    train_loop,
)
from zeroopt.collectives import registered

from .process import PretendProcess

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
# DDP asks the backend for futures, which the pretend NCCL does not have.
OF_ZEROOPT = [name for name, method in METHODS.items() if method.options is not None]


def _on_devices(function: Any, *args: Any, ranks: int = 2) -> list[list[Tensor]]:
    """By rank, what a function returns that is given arguments, this rank's device and the group of all."""
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> list[Tensor]:
        return function(*args, rank.device, dist.group.WORLD)

    lock = Lock()
    with (
        patch.object(test_on_gpu, "build", _one_by_one(lock, build)),
        patch.object(Shape, "make_model", _one_by_one(lock, Shape.make_model)),
    ):
        return on_ranks(ranks, run)[0]


def _on_one_device(function: Any, *args: Any) -> list[list[Tensor]]:
    return _on_devices(function, *args, ranks=1)


def _on_devices_without_kernels(*args: Any) -> list[list[Tensor]]:
    with built_without_cuda():
        return _on_devices(*args)


def _one_by_one(lock: Lock, function: Any) -> Any:
    """Ranks that are threads draw from one generator."""

    def run(*args: Any) -> Any:
        with lock:
            return function(*args)

    return run


def _on_cpu(function: Any, *args: Any) -> list[Tensor]:
    return function(*args, CPU, dist.group.WORLD)


def _losses(method: str, device: torch.device, group: dist.ProcessGroup) -> list[Tensor]:
    """Of each step of `bench.gpu.training_step`."""
    loop = StepLoop(METHODS[method], SHAPES["tiny"], device)
    for _ in range(4):
        loop.step()
    return [loss.cpu() for loss in loop.losses]


def _compare(on_devices: list[list[Tensor]], on_cpu: list[list[Tensor]], rtol: float = 0.0) -> None:
    for there, here in zip(on_devices, on_cpu, strict=True):
        assert there
        for value, expected in zip(there, here, strict=True):
            torch.testing.assert_close(value, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("tier", TIERS)
def test_tiers(tier: str, on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks) -> None:
    for transport in (sums_here, sums_of_backend):
        call = (train_elementwise, {"stage": 2, **TIERS[tier]}, transport)
        _compare(on_pretend_cuda(_on_devices, *call), run_on_ranks(2, _on_cpu, *call))


@pytest.mark.parametrize("tier", ["float32", "bfloat16"])
def test_levels(tier: str, on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks) -> None:
    for stage in STAGES:
        call = (train_elementwise, {"stage": stage, **TIERS[tier]}, sums_in_levels)
        expected = run_on_ranks(2, _on_cpu, *call)
        _compare(on_pretend_cuda(_on_devices, *call), expected)
        alone = on_pretend_cuda(_on_one_device, *call)
        _compare(alone, run_on_ranks(1, _on_cpu, *call))


def test_registered_memory(on_pretend_cuda: PretendProcess) -> None:
    options = {"stage": 2, **TIERS["bfloat16"]}
    for transport in (sums_in_registered_memory, registered):
        plain, in_registered = (
            on_pretend_cuda(_on_devices, train_elementwise, options, each) for each in (sums_here, transport)
        )
        _compare(in_registered, plain)


@pytest.mark.parametrize("transport", [sums_here, sums_of_backend, sums_in_levels])
def test_graphs(transport: Any, on_pretend_cuda: PretendProcess) -> None:
    for stage in STAGES:
        eager, replayed = (
            on_pretend_cuda(_on_one_device, train_by_graph, stage, is_captured, transport)
            for is_captured in (False, True)
        )
        _compare(replayed, eager)


@pytest.mark.parametrize("tier", ["float32", "bfloat16"])
def test_without_kernels(tier: str, on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks) -> None:
    options = {"stage": 2, "fused": "auto", **TIERS[tier]}
    there = on_pretend_cuda(_on_devices_without_kernels, train_elementwise, options, sums_here)
    _compare(there, run_on_ranks(2, _on_cpu, train_elementwise, {**options, "fused": False}, sums_here))


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name: str, on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks) -> None:
    call = (train_loop, LOOPS[name], 2)
    _compare(on_pretend_cuda(_on_devices, *call), run_on_ranks(2, _on_cpu, *call))


@pytest.mark.parametrize("method", OF_ZEROOPT)
def test_training_step(method: str, on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks) -> None:
    """Attention is another algorithm there, and autocast rounds other values."""
    call = (_losses, method)
    _compare(on_pretend_cuda(_on_devices, *call), run_on_ranks(2, _on_cpu, *call), rtol=1e-3)
