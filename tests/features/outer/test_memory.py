"""The formula of what outer steps take is what they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.features.outer.memory import outer_bytes, outer_bytes_saved

WIDTH, LAYERS = 64, 6
NUMEL = WIDTH * WIDTH * LAYERS


def momentum(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.7, momentum=0.9)


def held_by(options: dict[str, Any]) -> tuple[int, int, int, int]:
    """By the formula and in fact, in training and gathered to be saved."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    model, optimizer = zeroopt.wrap(
        net, torch.optim.SGD(net.parameters(), lr=0.1), bucket_mb=WIDTH * WIDTH * 4 / 2**20, average_every=4, **options
    )
    on_the_way = 0
    outer = optimizer._outer
    assert outer is not None
    for _ in range(9):
        model(torch.ones(2, WIDTH)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        travelling = [anchor for anchor in outer._anchors.values() if hasattr(anchor, "_buffer")]
        on_the_way = max(on_the_way, len(travelling))
    buffers = {buffer.data_ptr(): buffer.nbytes for buffer in outer._buffers._free}
    buffers |= {a._buffer.data_ptr(): a._buffer.nbytes for a in outer._anchors.values() if hasattr(a, "_buffer")}
    tensors = [a.values for a in outer._anchors.values()] + [a.param for a in outer._anchors.values() if a._is_lossy]
    tensors += [value for entry in outer.optimizer.state.values() for value in entry.values()]
    saved = optimizer.state_dict()["state"]
    gathered = [v for entry in saved.values() for name, v in entry["outer"].items() if name != "anchor"]
    buckets, config = optimizer._trained.buckets, optimizer._config
    return (
        outer_bytes(buckets, config, dist.get_world_size()),
        sum(tensor.nbytes for tensor in tensors) + sum(buffers.values()),
        outer_bytes_saved(buckets, config),
        sum(value.nbytes for value in gathered),
    )


@pytest.mark.parametrize(
    ("options", "outer_arrays", "buffers"),
    [
        ({}, 1, 3 * 4),
        ({"outer_dtype": torch.bfloat16}, 2, 3 * 2),
        ({"outer_fragments": 3, "outer_delay": 3}, 1, LAYERS * 4),
    ],
)
def test_is_what_is_held(run_on_ranks: RunOnRanks, options: dict[str, Any], outer_arrays: int, buffers: int) -> None:
    options = {"outer_optimizer": momentum, **options}
    for formula, held, formula_saved, saved in run_on_ranks(2, held_by, options):
        expected = 4 * NUMEL + 4 * NUMEL // 2 * outer_arrays + buffers * NUMEL // LAYERS
        assert formula == expected
        assert held <= formula and held >= formula - 2 * 4 * NUMEL // LAYERS  # fewer may travel at once in fact
        assert formula_saved == saved == 4 * NUMEL * outer_arrays


def test_a_plan_counts_them() -> None:
    """In all phases of a training, and more where states are put together to be saved."""
    net = nn.Linear(512, 512, bias=False)
    options: dict[str, Any] = {"average_every": 10, "stage": 2, "compare": False, "world_size": 2}
    plain = zeroopt.estimate_memory(net, torch.optim.AdamW, groups=4, **options)
    outer = zeroopt.estimate_memory(net, torch.optim.AdamW, groups=4, outer_optimizer=momentum, **options)
    own = 4 * 512 * 512 // 2
    parts = outer.asked.phase("step").parts
    assert parts["outer"] == own + own // 4 + own  # the anchor, a slice of the momentum, the only bucket on its way
    assert outer.asked.phase("step").total - plain.asked.phase("step").total == parts["outer"]
    assert outer.asked.phase("loading").total - plain.asked.phase("loading").total == parts["outer"] + own
