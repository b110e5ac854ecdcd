"""A model of which a CUDA graph was captured before the first step trains on, and its parameters stay where the graph reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from worker_pool import RunOnRanks

import zeroopt

from .process import PretendProcess
from .test_moving import WIDTH, Backwards

pytestmark = pytest.mark.slow


def _train(rank: int, device: torch.device, stage: int, *, captured: bool) -> tuple[list[Tensor], bool]:
    """Parameters after some steps, and whether they lie where they did after wrapping."""
    net = Backwards().to(device)
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
    model, optimizer = zeroopt.wrap(net, inner, stage=stage, bucket_mb=0.0003, transport="torch")
    addresses = [param.data_ptr() for param in net.parameters()]
    if captured:
        _capture_forward(model, device)
    for number in range(3):
        generator = torch.Generator().manual_seed(10 * rank + number)
        model(torch.randn(4, WIDTH, generator=generator).to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    params = [param.detach().cpu().clone() for param in net.parameters()]
    return params, addresses == [param.data_ptr() for param in net.parameters()]


def _capture_forward(model: Any, device: torch.device) -> None:
    from .surface import capturing

    x = torch.ones(4, WIDTH, device=device)
    with capturing(device), torch.no_grad():
        model(x)


def _train_here(stage: int, captured: list[bool]) -> list[tuple[list[Tensor], bool]]:
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> tuple[list[Tensor], bool]:
        return _train(rank.number, rank.device, stage, captured=captured[rank.number])

    return on_ranks(2, run)[0]


def _train_on_cpu(stage: int) -> list[Tensor]:
    return _train(torch.distributed.get_rank(), torch.device("cpu"), stage, captured=False)[0]


@pytest.mark.parametrize("captured", [[True, True], [False, True], [False, False]], ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_stay_where_a_graph_reads_them(
    stage: int, captured: list[bool], on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks
) -> None:
    expected = run_on_ranks(2, _train_on_cpu, stage)
    for params, stayed in on_pretend_cuda(_train_here, stage, captured):
        assert stayed is any(captured)
        for param, other in zip(params, expected[0], strict=True):
            torch.testing.assert_close(param, other, rtol=0, atol=0)


def _with_a_frozen_parameter_on_the_cpu() -> bool:
    """Whether graphs are looked for."""
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> bool:
        net = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
        net[0].requires_grad_(False)
        net[1].to(rank.device)
        model, _ = zeroopt.wrap(net, torch.optim.SGD(net[1].parameters(), lr=0.1), transport="torch")
        return model._captures is not None

    return on_ranks(1, run)[0][0]


def test_graphs_are_looked_for_where_parameters_are_trained(on_pretend_cuda: PretendProcess) -> None:
    assert on_pretend_cuda(_with_a_frozen_parameter_on_the_cpu)
