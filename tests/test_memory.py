"""Peak memory of a rank against the formula of its stage, wrapping included."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch
from measure import peak_rss_bytes, reset_peak_rss, rss_bytes, run_fresh
from torch import nn

import zeroopt

WIDTH, LAYERS, BUCKET_MB = 1024, 40, 4.0
NUM_PARAMS = WIDTH * WIDTH * LAYERS
BUCKET_BYTES = WIDTH * WIDTH * 4  # one layer fills a bucket


def peak_bytes(stage: int, wrap_only: bool) -> int:
    """Peak resident memory above what the process had before it built the model."""
    train(stage, width=8, layers=1, steps=1)  # torch imports half of itself when the first optimizer is made
    gc.collect()
    before = rss_bytes()
    reset_peak_rss()
    train(stage, WIDTH, LAYERS, steps=0 if wrap_only else 3)
    return peak_rss_bytes() - before


def train(stage: int, width: int, layers: int, steps: int) -> None:
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), stage=stage, bucket_mb=BUCKET_MB)
    for _ in range(steps):
        model(torch.randn(2, width)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def formula_bytes(stage: int, world_size: int) -> float:
    """float32 parameters, gradients and AdamW's two moments (ZeRO: Rajbhandari et al., 2020, section 5)."""
    gradient = 4 if stage < 2 else 4 / world_size
    moments = 8 if stage < 1 else 8 / world_size
    return (4 + gradient + moments) * NUM_PARAMS


# One bucket fills, one travels, the slices of one are received, and one gradient comes from autograd at a time.
BOUNDED_BYTES = (2 + 1 + 1) * BUCKET_BYTES + 2 * 2**20
# As far as glibc serves them from its heap, gradients that come and go leave holes there of about their size.
HEAP_HOLES_BYTES = 10 * BUCKET_BYTES
M_MMAP_THRESHOLD = -3  # from malloc.h


def peak_bytes_without_heap_holes(stage: int) -> int:
    """`peak_bytes` where each large block has pages of its own, so that only what is in use counts."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17) == 1
    return peak_bytes(stage, wrap_only=False)


@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (1, 2), (2, 2), (2, 4)])
def test_peak_memory_follows_the_formula(stage: int, world_size: int) -> None:
    formula = formula_bytes(stage, world_size)
    for peak in run_fresh(world_size, peak_bytes_without_heap_holes, stage):
        print(
            f"stage {stage}, {world_size} ranks: {peak / NUM_PARAMS:.2f} bytes a parameter, {formula / NUM_PARAMS:.2f}"
        )
        assert 0.99 * formula <= peak <= formula + BOUNDED_BYTES


def test_peak_memory_with_the_heap_as_it_is() -> None:
    for peak in run_fresh(2, peak_bytes, 2, False):
        assert peak <= formula_bytes(2, 2) + BOUNDED_BYTES + HEAP_HOLES_BYTES


def test_wrapping_needs_one_bucket_more_than_it_leaves() -> None:
    left = (4 + 4 / 2) * NUM_PARAMS  # parameters and gradient shard
    for peak in run_fresh(2, peak_bytes, 2, True):
        print(f"wrap: {(peak - left) / 2**20:.1f} MiB above what it leaves")
        assert peak <= left + BUCKET_BYTES + 2**20
