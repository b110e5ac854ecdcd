"""No rank ever holds the whole state, neither when it saves nor when it loads."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from measure import Samples, peak_of_mean, run_fresh, sampled_pss
from torch import nn

import zeroopt
import zeroopt.checkpoint

pytestmark = pytest.mark.slow

WIDTH, LAYERS = 1024, 12
NUM_PARAMS = WIDTH * WIDTH * LAYERS
TENSOR_BYTES = WIDTH * WIDTH * 4
M_MMAP_THRESHOLD = -3
BOUNDED_BYTES = 6 * TENSOR_BYTES  # what it takes to make one tensor to be written, and buffers of files and pipes


def build(width: int, layers: int, options: dict[str, Any]) -> tuple[Any, Any]:
    """With state."""
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=4.0, **options)
    model(torch.randn(2, width, dtype=options.get("param_dtype"))).float().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def sampled_calls(path: Path, options: dict[str, Any]) -> dict[str, Samples]:
    """Memory above what a trained model takes, while it is saved, copied to be saved, and loaded."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17) == 1  # so that only what is in use counts
    small = build(8, 1, options)
    zeroopt.checkpoint.async_save(path / "small", *small).result()  # which imports and starts much
    zeroopt.checkpoint.load(path / "small", *small)
    model, optimizer = build(WIDTH, LAYERS, options)
    samples = {}
    for what in ("save", "load", "async_save"):
        gc.collect()
        dist.barrier()
        with sampled_pss() as samples[what]:
            if what == "save":
                zeroopt.checkpoint.save(path / "x", model, optimizer)
            elif what == "load":
                zeroopt.checkpoint.load(path / "x", model, optimizer)
            else:
                zeroopt.checkpoint.async_save(path / "x", model, optimizer).result()
            dist.barrier()
    return samples


@pytest.mark.parametrize(
    ("world_size", "options"),
    [(2, {}), (4, {}), (2, {"param_dtype": torch.bfloat16, "master_weights": "remainder", "state_dtype": torch.int8})],
)
def test_peak_memory(tmp_path: Path, world_size: int, options: dict[str, Any]) -> None:
    """A shard is a parameter and two moments in float32, whatever they are kept in."""
    by_rank = run_fresh(world_size, sampled_calls, tmp_path, options)
    shard_bytes = 3 * 4 * NUM_PARAMS / world_size
    peaks = {what: peak_of_mean([samples[what] for samples in by_rank]) for what in by_rank[0]}
    for what, peak in peaks.items():
        print(f"{world_size} ranks, {options}, {what}: {peak / 2**20:.0f} MiB, a shard has {shard_bytes / 2**20:.0f}")
    assert peaks["save"] <= BOUNDED_BYTES
    assert peaks["load"] <= shard_bytes + BOUNDED_BYTES
    assert peaks["async_save"] <= shard_bytes + BOUNDED_BYTES
