"""The whole path of a GPU with NCCL, on pretend devices: bits, races and orders."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from whole_optimizers import Lars, no_padding
from worker_pool import RunOnRanks

from zeroopt.options import precision

from .process import PretendProcess
from .training import BF16, Loop, train

pytestmark = pytest.mark.slow

SIDES = ("loop", "forward", "branch", "average")
LOOPS = {
    "stage 0": Loop({"stage": 0}),
    "stage 1": Loop({"stage": 1}),
    "stage 2": Loop({"stage": 2}),
    "stage 1, accumulated": Loop({"stage": 1}, accumulate=2),
    "stage 2, accumulated": Loop({"stage": 2}, accumulate=2),
    "stage 2, no_sync": Loop({"stage": 2}, accumulate=2, no_sync=True),
    "stage 2, torch's clipping": Loop({"stage": 2}, clip=0.1),
    "stage 2, max_grad_norm": Loop({"stage": 2, "max_grad_norm": 0.1}),
    "stage 2, GradScaler": Loop({"stage": 2}, scaler=True),
    "stage 2, GradScaler and clipping": Loop({"stage": 2}, scaler=True, clip=0.1),
    "stage 2, bfloat16": Loop({"stage": 2, **BF16}),
    "stage 2, remainders, 8 bits": Loop({"stage": 2, **BF16, "master_weights": "remainder", "state_dtype": torch.int8}),
    "stage 1, no masters": Loop({"stage": 1, **BF16, "master_weights": "none", "state_dtype": torch.bfloat16}),
    "stage 1, reduce_dtype": Loop({"stage": 1, "reduce_dtype": torch.bfloat16}, accumulate=2),
    "stage 2, four buffers": Loop({"stage": 2, "bucket_buffers": 4}),
    "stage 2, no overlap": Loop({"stage": 2, "overlap": False}),
    **{f"stage {stage}, {side} on a stream": Loop({"stage": stage}, side=side) for stage in range(3) for side in SIDES},
    **{f"stage {stage}, not on the current device": Loop({"stage": stage}, device="other") for stage in range(3)},
    **{f"stage {stage}, sums of our own": Loop({"stage": stage, "transport": "all_to_all"}) for stage in range(3)},
    "stage 2, bfloat16, sums of our own": Loop(
        {"stage": 2, **BF16, "transport": "all_to_all"}, accumulate=2, side="branch"
    ),
    "stage 2, gradients as codes": Loop(  # those of layers, which are large enough
        {"stage": 2, "gradient_compression": "int8", "bucket_mb": 0.02}, accumulate=2, side="branch", width=64
    ),
    "stage 2, all of it": Loop({"stage": 2, **BF16, "max_grad_norm": 0.1}, side="branch", accumulate=2, steps=2),
    "stage 2, the optimizer's own step": Loop({"stage": 2, "fused": False}),
    "stage 1, across slices": Loop({"stage": 1}, accumulate=2, optimizer=Lars, across_slices=True),
    "stage 2, across slices, bfloat16": Loop({"stage": 2, **BF16}, accumulate=2, optimizer=Lars, across_slices=True),
}
NUM_ORDERS = -(-10_000 // len(LOOPS))  # of each


def train_on_cpu(loop: Loop) -> list[torch.Tensor]:
    # Cut as on a device: the squares of a norm are added up slice by slice.
    cut = patch.object(precision, "_CUT_ON_CPU", precision._CUT_ON_DEVICES)
    with cut, no_padding() if loop.across_slices else nullcontext():
        return train(loop, torch.distributed.get_rank(), torch.device("cpu"))


def train_here(loop: Loop, num_orders: int) -> dict[str, Any]:
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> list[torch.Tensor]:
        return train(loop, rank.number, rank.device_for(loop), rank.recorded)

    with no_padding() if loop.across_slices else nullcontext():
        params, recording = on_ranks(loop.ranks, run)
    return {
        "params": params,
        "races": [str(race) for race in recording.races()],
        "at once": [str(pair) for pair in recording.at_once()],
        "wrong orders": recording.wrong_orders(range(num_orders)),
        "nodes": len(recording.nodes),
    }


@pytest.mark.parametrize("name", LOOPS)
def test_trains_as_on_the_cpu_in_any_order(
    name: str, on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks
) -> None:
    expected = run_on_ranks(2, train_on_cpu, LOOPS[name])
    result = on_pretend_cuda(train_here, LOOPS[name], NUM_ORDERS)
    assert result["nodes"] > 100
    assert result["races"] == []
    assert result["wrong orders"] == {}
    for params in result["params"]:
        for param, other in zip(params, expected[0], strict=True):
            torch.testing.assert_close(param, other, rtol=0, atol=0)


@pytest.mark.parametrize("stage", range(3))
def test_ranks_that_recompute_unequally_often_wait_for_each_other(
    stage: int, on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks
) -> None:
    loop = Loop({"stage": stage}, recomputed=True, optimizer=partial(torch.optim.SGD, lr=0.1))
    expected = run_on_ranks(2, train_on_cpu, loop)
    result = on_pretend_cuda(train_here, loop, 20)
    assert (result["races"], result["wrong orders"]) == ([], {})
    for params in result["params"]:
        for param, other in zip(
            params, expected[0], strict=True
        ):  # there what comes once more is added in another order
            torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
