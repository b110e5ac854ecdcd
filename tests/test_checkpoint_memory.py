"""zeroopt.checkpoint holds no more than the rank's part, and one tensor or two besides."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from measure import Samples, run_fresh, sampled_pss
from test_memory import M_MMAP_THRESHOLD
from torch import nn

import zeroopt
import zeroopt.checkpoint

WIDTH, LAYERS = 1024, 12
NUM_PARAMS = WIDTH * WIDTH * LAYERS
LAYER_BYTES = WIDTH * WIDTH * 4
SLACK_BYTES = 2 * LAYER_BYTES + 2 * 2**20

Wrapped = tuple[zeroopt.ZeroDataParallel, zeroopt.ZeroOptimizer]


def wrapped(layers: int, width: int) -> Wrapped:
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=4.0)
    return model, optimizer


def trained(layers: int, width: int) -> Wrapped:
    model, optimizer = wrapped(layers, width)
    model(torch.randn(2, width)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def save(path: str, model: Any, optimizer: Any) -> None:
    zeroopt.checkpoint.save(path, model, optimizer)


def save_async(path: str, model: Any, optimizer: Any) -> None:
    pending: Future[None] = zeroopt.checkpoint.async_save(path, model, optimizer)
    pending.result()


def load(path: str, model: Any, optimizer: Any) -> None:
    zeroopt.checkpoint.load(path, model, optimizer)


def sampled(do: Callable[[str, Any, Any], None], make: Callable[[int, int], Wrapped], path: str) -> Samples:
    """Memory above that of the model and the optimizer; shared pages count once."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17) == 1  # only what is in use counts
    rehearsal = trained(1, 8)
    save(f"{path}-rehearsal", *rehearsal)
    do(f"{path}-rehearsal", *rehearsal)  # imports, threads
    own = make(LAYERS, WIDTH)
    gc.collect()
    dist.barrier()
    with sampled_pss() as samples:
        do(path, *own)
        dist.barrier()
    return samples


def save_trained(path: str) -> None:
    save(path, *trained(LAYERS, WIDTH))


@pytest.mark.parametrize(("do", "held_bytes"), [(save, 0), (save_async, (4 + 8) * NUM_PARAMS / 2)])
def test_saving(tmp_path: Path, do: Callable[[str, Any, Any], None], held_bytes: float) -> None:
    for samples in run_fresh(2, sampled, do, trained, str(tmp_path / "checkpoint")):
        peak = max(held for _, held in samples)
        print(f"{do.__name__}: {(peak - held_bytes) / LAYER_BYTES:.2f} layers above {held_bytes / LAYER_BYTES}")
        assert peak <= held_bytes + SLACK_BYTES


def test_loading(tmp_path: Path) -> None:
    """The part of the parameters is read aside; the state that is read becomes the optimizer's."""
    path = str(tmp_path / "checkpoint")
    run_fresh(2, save_trained, path)
    held_bytes = (4 + 8) * NUM_PARAMS / 2
    for samples in run_fresh(2, sampled, load, wrapped, path):
        peak = max(held for _, held in samples)
        print(f"load: {(peak - held_bytes) / LAYER_BYTES:.2f} layers above {held_bytes / LAYER_BYTES}")
        assert peak <= held_bytes + SLACK_BYTES
