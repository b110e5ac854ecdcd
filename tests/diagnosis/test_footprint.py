"""What the log says of a wrapped model on rank 0, and that the bytes in it are those of the formula."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import nn
from transports import LogLines
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.diagnosis.footprint import Footprint, footprint

WIDTH, LAYERS, BUCKET_MB = 256, 6, 0.25
NUMEL = WIDTH * WIDTH * LAYERS  # each layer fills a bucket, and nothing is padded
BUCKET_NUMEL = WIDTH * WIDTH


def wrapped(options: dict[str, Any], optimizer: str = "AdamW") -> tuple[Any, zeroopt.ZeroOptimizer]:
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    inner = getattr(torch.optim, optimizer)(net.parameters())
    return zeroopt.wrap(net, inner, bucket_mb=BUCKET_MB, **options)


def counted(variants: list[dict[str, Any]]) -> list[tuple[Footprint, int]]:
    """What is counted when a model is wrapped, and the bytes of the optimizer's state after a step."""
    results = []
    for options in variants:
        model, optimizer = wrapped(options)
        held = footprint(
            optimizer._trained.buckets,
            optimizer._reducer.stores,
            optimizer._inner,
            optimizer._config,
            optimizer._transport,
            model.replica.bucket_bytes,
        )
        model(torch.randn(2, WIDTH, dtype=options.get("param_dtype"))).float().sum().backward()
        optimizer.step()
        state = optimizer.state.values()
        names = {"exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"}
        results.append((held, sum(v.nbytes for entry in state for name, v in entry.items() if name in names)))
    return results


BF16 = {"param_dtype": torch.bfloat16}


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_are_those_of_the_formula(run_on_ranks: RunOnRanks, world_size: int) -> None:
    part = NUMEL // world_size
    moments = 8 * part
    full = 4 * BUCKET_NUMEL  # a bucket has as many bytes in any dtype
    expected: list[tuple[dict[str, Any], Footprint]] = [
        ({"stage": 0}, Footprint(4 * NUMEL, 0, 4 * NUMEL, 0, 8 * NUMEL)),
        ({"stage": 1}, Footprint(4 * NUMEL, 0, 4 * NUMEL, 0, moments)),
        ({"stage": 2}, Footprint(4 * NUMEL, 0, 4 * part, 2 * full, moments)),
        ({"stage": 2, "overlap": False}, Footprint(4 * NUMEL, 0, 4 * part, full, moments)),
        ({"stage": 2, "share_parameters": True}, Footprint(4 * part, 0, 4 * part, 2 * full, moments)),
        ({"stage": 1, **BF16}, Footprint(2 * NUMEL, 4 * part, 2 * NUMEL + 4 * part, 0, moments)),
        ({"stage": 2, **BF16}, Footprint(2 * NUMEL, 4 * part, 4 * part, 2 * full, moments)),
        (
            {"stage": 2, **BF16, "master_weights": "remainder", "state_dtype": torch.int8},
            Footprint(2 * NUMEL, 2 * part, 4 * part, 2 * full, 2 * part + 2 * part // 256 * 4),
        ),
    ]
    for rank in run_on_ranks(world_size, counted, [options for options, _ in expected]):
        for (options, wanted), (held, state_bytes) in zip(expected, rank, strict=True):
            assert held == wanted, options
            assert state_bytes == wanted.moments, options
            assert held.total == sum(vars(wanted).values())


def logged(level: int, optimizer: str, step: bool) -> list[str]:
    """The lines of a wrap, and of a first step in which gradients arrive in the reverse of the planned order."""
    torch.manual_seed(0)
    log = logging.getLogger("zeroopt")
    before = log.level
    log.setLevel(level)
    try:
        with LogLines() as lines:
            model, wrapped_optimizer = wrapped({"stage": 2}, optimizer)
            if step:
                x = torch.randn(2, WIDTH)
                sum(layer(x).sum() for layer in reversed(model.module)).backward()
                wrapped_optimizer.step()
    finally:
        log.setLevel(before)
    return lines


def test_one_line_tells_what_was_made_of_a_model(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks(2, logged, logging.INFO, "AdamW", False)
    assert second == []
    (line,) = first
    assert line == (
        "stage 2 over 2 ranks, transport shm: 6 parameters (393216 elements) in 6 buckets. A rank will hold 4.5 MB: parameters "
        "1.6 MB, masters 0.0 MB, gradients 0.8 MB in sums and 0.5 MB in buffers, optimizer state 1.6 MB"
    )
    assert run_on_ranks(2, logged, logging.WARNING, "AdamW", True) == [[], []]


def test_state_of_an_optimizer_without_a_kernel_is_found_out(run_on_ranks: RunOnRanks) -> None:
    (line,), _ = run_on_ranks(2, logged, logging.INFO, "Adadelta", False)
    assert line.endswith("in buffers, optimizer state 1.6 MB")  # square_avg and acc_delta


def test_debug_lines_tell_of_buckets_and_the_new_plan(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks(2, logged, logging.DEBUG, "AdamW", True)
    assert second == []
    _, *buckets, plan = first
    for index, line in enumerate(buckets):
        name = f"{LAYERS - 1 - index}.weight"
        assert line == (
            f"bucket {index} ({name} … {name}): 1 parameter, 65536 elements of torch.float32, of which rank 0 steps 32768"
        )
    assert len(buckets) == LAYERS
    assert re.fullmatch(
        r"6 buckets are planned anew, as 6, in the order .* the first was of 5.weight … 5.weight, and will be of 0.weight … 0.weight",
        plan,
    )
