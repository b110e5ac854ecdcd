"""Sums of our own on a device: the bits of the CPU transports, in any order that the device would be free to take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from worker_pool import RunOnRanks

from .process import PretendProcess
from .training import BF16, Loop, train

pytestmark = pytest.mark.slow

LOOPS = {
    **{f"stage {stage}": Loop({"stage": stage}, accumulate=2) for stage in (0, 1, 2)},
    "bfloat16": Loop({"stage": 2, **BF16}, accumulate=2),
    "float16": Loop({"stage": 2, "param_dtype": torch.float16}),
    "reduce_dtype": Loop({"stage": 2, "reduce_dtype": torch.bfloat16}, accumulate=2),
    "four buffers": Loop({"stage": 2, "bucket_buffers": 4}, accumulate=2),
    "step in backward": Loop({"stage": 2, "step_in_backward": True}),
}
SIZES = [1, 2, 8, 9, 256, 257, 700]  # numbers of slices
SLICE_BYTES = 4096


def _train_on_cpu(loop: Loop) -> list[Tensor]:
    loop = replace(loop, options={**loop.options, "transport": "pairwise"})
    return train(loop, torch.distributed.get_rank(), torch.device("cpu"))


def _train_here(loop: Loop, world_size: int) -> dict[str, Any]:
    from .ranks import Rank, on_ranks

    loop = replace(loop, options={**loop.options, "transport": "auto"})

    def run(rank: Rank) -> list[Tensor]:
        return train(loop, rank.number, rank.device, rank.recorded)

    params, recording = on_ranks(world_size, run)
    return {
        "params": params,
        "races": [str(race) for race in recording.races()],
        "wrong orders": recording.wrong_orders(range(10)),
        "collectives": recording.figures().collectives,
    }


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", LOOPS)
def test_trains_as_the_cpu_does(
    name: str, world_size: int, on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks
) -> None:
    _compare(LOOPS[name], world_size, on_pretend_cuda, run_on_ranks)


def _compare(loop: Loop, world_size: int, on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks) -> None:
    expected = run_on_ranks(world_size, _train_on_cpu, loop)
    result = on_pretend_cuda(_train_here, loop, world_size)
    assert result["collectives"]["all_to_all"] > 1
    assert result["races"] == []
    assert result["wrong orders"] == {}
    for params in result["params"]:
        for param, other in zip(params, expected[0], strict=True):
            torch.testing.assert_close(param, other, rtol=0, atol=0)


MICRO_BATCHES = {
    f"{stage} {side}".strip(): Loop(
        {"stage": stage, "micro_batches": 4, "max_grad_norm": 0.1}, accumulate=4, no_sync=True, side=side
    )
    for stage, side in ((0, ""), (1, "branch"), (2, "branch"), (2, "forward"))
}
MICRO_BATCHES["bfloat16"] = Loop(
    {"stage": 2, "micro_batches": 4, "reduce_dtype": torch.float32, **BF16}, accumulate=4, no_sync=True
)


@pytest.mark.parametrize("name", MICRO_BATCHES)
def test_micro_batches_are_summed_as_on_the_cpu(
    name: str, on_pretend_cuda: PretendProcess, run_on_ranks: RunOnRanks
) -> None:
    _compare(MICRO_BATCHES[name], 2, on_pretend_cuda, run_on_ranks)


def _reduce(device: str) -> list[Tensor]:
    """Sums with a base, of bfloat16 into float32 and of float32 into bfloat16."""
    from zeroopt import ops

    generator = torch.Generator().manual_seed(0)
    sums = []
    for count in SIZES:
        for dtype, out_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
            slices = torch.randn(count, 50, generator=generator).to(dtype)
            out = torch.randn(50, generator=generator).to(out_dtype).to(device)
            ops.reduce(slices.to(device).unbind(), out, base=out)
            sums.append(out.cpu().clone())
    return sums


def test_any_number_of_slices_has_the_same_sum(on_pretend_cuda: PretendProcess) -> None:
    for mine, theirs in zip(on_pretend_cuda(_reduce, "cuda"), _reduce("cpu"), strict=True):
        assert torch.equal(mine, theirs)


def _peak_of(num_buckets: int, dtype: torch.dtype) -> int | None:
    """Bytes that reduces of so many buckets take, with an NCCL that tells the allocator of its stream: what is dropped comes back late."""
    from zeroopt.collectives.select import connect_transport

    from . import nccl
    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> None:
        transport = connect_transport("all_to_all", torch.distributed.group.WORLD, rank.device)
        full = torch.ones(SLICE_BYTES // dtype.itemsize * rank.size, dtype=dtype, device=rank.device)
        out = torch.zeros(len(full) // rank.size, device=rank.device)
        with rank.recorded():
            for _ in range(num_buckets):
                transport.start_reduce_scatter(full, out).finish()
            transport.flush()

    with patch.object(nccl, "keeps_by_record_stream", True):
        return on_ranks(2, run)[1].figures(0).peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_received_has_one_place_for_all_buckets(dtype: torch.dtype, on_pretend_cuda: PretendProcess) -> None:
    for num_buckets in (1, 10):
        assert on_pretend_cuda(_peak_of, num_buckets, dtype) == 2 * SLICE_BYTES
