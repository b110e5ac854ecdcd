"""Peak memory of a rank against the formula of its stage, wrapping included."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from measure import Samples, peak_of_mean, run_fresh, sampled_pss
from torch import nn

import zeroopt

pytestmark = pytest.mark.slow

WIDTH, LAYERS, BUCKET_MB = 1024, 40, 4.0
NUM_PARAMS = WIDTH * WIDTH * LAYERS
BUCKET_BYTES = WIDTH * WIDTH * 4  # one layer fills a bucket


def sampled_bytes(options: dict[str, Any], wrap_only: bool = False) -> Samples:
    """Memory above what the process had before it built the model; shared pages count once."""
    train(options, width=8, layers=1, steps=1)  # torch imports half of itself when the first optimizer is made
    gc.collect()
    with sampled_pss() as samples:
        trained = train(options, WIDTH, LAYERS, steps=0 if wrap_only else 3)
    dist.barrier()  # who lets go of shared pages leaves its part of them to peers that are still sampled
    del trained
    return samples


def train(
    options: dict[str, Any], width: int, layers: int, steps: int
) -> tuple[zeroopt.ZeroDataParallel, zeroopt.ZeroOptimizer]:
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=BUCKET_MB, **options)
    for _ in range(steps):
        model(torch.randn(2, width, dtype=options.get("param_dtype"))).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    return model, optimizer


def formula_bytes(options: dict[str, Any], world_size: int) -> float:
    """Parameters, gradients, masters and AdamW's two moments (ZeRO: Rajbhandari et al., 2020, section 5)."""
    stage = options["stage"]
    param_bytes = options.get("param_dtype", torch.float32).itemsize
    parameters = param_bytes / world_size if options.get("share_parameters") else param_bytes
    gradient = 4 if stage < 2 else 4 / world_size  # sums are float32, whatever the parameters are
    if options.get("step_in_backward"):
        gradient = 0
    master_bytes = {"float32": 4, "remainder": 2, "none": 0}[options.get("master_weights", "float32")]
    masters = master_bytes / world_size if "param_dtype" in options else 0
    moment_bytes = {torch.float32: 4, torch.bfloat16: 2, torch.int8: 1 + 4 / 256}
    moments = 2 * moment_bytes[options.get("state_dtype", torch.float32)] / (1 if stage < 1 else world_size)
    return (parameters + gradient + masters + moments) * NUM_PARAMS


# One bucket fills, one travels, the slices of one are received, and one gradient comes from autograd at a time.
BOUNDED_BYTES = (2 + 1 + 1) * BUCKET_BYTES + 2 * 2**20
# As far as glibc serves them from its heap, gradients that come and go leave holes there of about their size.
HEAP_HOLES_BYTES = 10 * BUCKET_BYTES
M_MMAP_THRESHOLD = -3  # from malloc.h


def sampled_bytes_without_heap_holes(options: dict[str, Any]) -> Samples:
    """`sampled_bytes` where each large block has pages of its own, so that only what is in use counts."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17) == 1
    return sampled_bytes(options)


@pytest.mark.parametrize(
    ("options", "world_size"),
    [
        ({"stage": 0}, 2),
        ({"stage": 1}, 2),
        ({"stage": 2}, 2),
        ({"stage": 2}, 4),
        ({"stage": 2, "transport": "pairwise"}, 2),
        ({"stage": 2, "share_parameters": True}, 2),
        ({"stage": 2, "share_parameters": True}, 4),
        ({"stage": 2, "state_dtype": torch.int8}, 2),
        ({"stage": 2, "param_dtype": torch.bfloat16}, 2),
        ({"stage": 2, "param_dtype": torch.bfloat16, "master_weights": "remainder", "state_dtype": torch.int8}, 2),
        ({"stage": 2, "param_dtype": torch.bfloat16, "master_weights": "none", "state_dtype": torch.bfloat16}, 4),
        ({"stage": 2, "step_in_backward": True}, 2),
    ],
)
def test_peak_memory_follows_the_formula(options: dict[str, Any], world_size: int) -> None:
    formula = formula_bytes(options, world_size)
    mean = peak_of_mean(run_fresh(world_size, sampled_bytes_without_heap_holes, options))
    print(f"{options}, {world_size} ranks: {mean / NUM_PARAMS:.2f} bytes a parameter, {formula / NUM_PARAMS:.2f}")
    assert 0.99 * formula <= mean <= formula + BOUNDED_BYTES


def test_peak_memory_with_the_heap_as_it_is() -> None:
    peak = peak_of_mean(run_fresh(2, sampled_bytes, {"stage": 2}))
    assert peak <= formula_bytes({"stage": 2}, 2) + BOUNDED_BYTES + HEAP_HOLES_BYTES


def test_wrapping_needs_one_bucket_more_than_it_leaves() -> None:
    left = (4 + 4 / 2) * NUM_PARAMS  # parameters and gradient shard
    peak = peak_of_mean(run_fresh(2, sampled_bytes, {"stage": 2}, True))
    print(f"wrap: {(peak - left) / 2**20:.1f} MiB above what it leaves")
    assert peak <= left + BUCKET_BYTES + 2**20
