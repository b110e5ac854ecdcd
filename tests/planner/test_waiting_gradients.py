"""Gradients that wait for their bucket are those that really wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.planner.activations import trace_activations
from zeroopt.planner.estimator import config_of
from zeroopt.planner.rehearsal import Cluster, Rehearsal, find_trainees
from zeroopt.planner.waiting_gradients import waiting_gradients
from zeroopt.storage.buffer_pool import num_buffers

WIDTH, LAYERS = 32, 6
SIZE = WIDTH * WIDTH * 4  # bytes of a gradient, and of a bucket
ORDERS = {
    "as planned": [0, 1, 2, 3, 4, 5],
    "the other way": [5, 4, 3, 2, 1, 0],
    "mixed": [3, 0, 4, 1, 5, 2],
}


class Net(nn.Module):
    """Layers that run in another order than they are defined in, and are used past their calls, so that no forward foretells it."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order = order
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for number in self.order:
            x = F.linear(x, self.layers[number].weight)
        return x


OPTIONS: dict[str, Any] = {"stage": 2, "bucket_mb": SIZE / 2**20}


def planned(order: list[int], *, packs_together: bool = False, **options: Any) -> list[int]:
    """Gradients that wait, as each comes."""
    net = Net(order)
    config = config_of({**OPTIONS, **options})
    rehearsal = Rehearsal(find_trainees(net, torch.optim.SGD(net.parameters(), lr=0.1)), config, Cluster(2, 2))
    traced = trace_activations(net, torch.randn(2, WIDTH))
    waiting = waiting_gradients(rehearsal, traced, num_buffers(config), packs_together=packs_together)
    return [num_bytes // SIZE for num_bytes in waiting]


def really_waiting(order: list[int], options: dict[str, Any], packs_together: bool) -> list[int]:
    """The same in the first backward of a wrapped model."""
    net = Net(order)
    model, _ = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), **{**OPTIONS, **options})
    reducer = model.replica.reducer
    reducer._filling.packs_together = packs_together
    waiting = [0]
    taken = reducer.take_up

    def take_up(index: int) -> None:
        taken(index)
        filling = reducer._filling
        waiting.append(sum(filling.arrivals.arrived) - sum(filling.packed))

    reducer.take_up = take_up  # type: ignore[method-assign]
    model(torch.randn(2, WIDTH)).sum().backward()
    return waiting


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("options", [{}, {"bucket_buffers": 3}, {"overlap": False}], ids=str)
def test_they_are_those_that_really_wait(order: str, options: dict[str, Any], run_on_ranks: RunOnRanks) -> None:
    expected = planned(ORDERS[order], **options)
    for waiting in run_on_ranks(2, really_waiting, ORDERS[order], options, False):
        assert waiting == expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("options", [{}, {"bucket_buffers": 3}, {"stage": 1}], ids=str)
def test_on_a_device_they_wait_for_all_of_their_bucket(
    order: str, options: dict[str, Any], run_on_ranks: RunOnRanks
) -> None:
    of_two = {"bucket_mb": 2 * SIZE / 2**20, **options}
    expected = planned(ORDERS[order], packs_together=True, **of_two)
    assert max(expected) > 0
    for waiting in run_on_ranks(2, really_waiting, ORDERS[order], of_two, True):
        assert waiting == expected


def test_none_wait_in_the_order_of_the_plan_and_most_in_the_other() -> None:
    assert planned(ORDERS["as planned"]) == [0] * (LAYERS + 1)
    assert max(planned(ORDERS["the other way"])) == LAYERS - 2  # one lies in a buffer, and the last one lets all go


def test_none_wait_where_each_bucket_has_a_buffer() -> None:
    assert planned(ORDERS["the other way"], stage=1) == [0] * (LAYERS + 1)
