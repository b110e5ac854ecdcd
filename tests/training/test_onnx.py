"""A wrapped model leaves as ONNX: rank 0 exports it alone, and onnxruntime computes what torch does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import TIERS, same_batch, wrapped
from torch import Tensor
from training import loss_of
from worker_pool import RunOnRanks

import zeroopt

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="ONNX needs it")


def train(model: zeroopt.ZeroDataParallel, optimizer: zeroopt.ZeroOptimizer) -> None:
    for step in range(2):
        loss_of(model(same_batch("lm", step))).backward()
        optimizer.step()  # after the last one, parameters are still on their way
        optimizer.zero_grad()


def export(model: torch.nn.Module, to: Path) -> None:
    tokens = same_batch("lm", 0)
    torch.onnx.export(model.eval(), (tokens,), to, dynamo=True, external_data=False, verbose=False)


def export_as_it_is(to: Path, options: dict[str, Any]) -> Tensor:
    """Of `.module`, while the other rank waits. Returns what torch makes of the batch, and then of another one after a step more."""
    model, optimizer = wrapped("lm", "adamw", options)
    train(model, optimizer)
    if dist.get_rank() == 0:
        export(model.module, to)
    dist.barrier()
    with torch.no_grad():
        output: Tensor = model(same_batch("lm", 0)).clone()
    train(model, optimizer)  # nothing that the export did is in the way
    return output


def export_exactly(to: Path, options: dict[str, Any]) -> Tensor:
    """Of a float32 copy with all that masters or remainders keep. Returns what torch makes of the batch with that."""
    model, optimizer = wrapped("lm", "adamw", options)
    train(model, optimizer)
    exact = {name: optimizer.full_parameter(param) for name, param in model.named_parameters()}
    plain = copy.deepcopy(model).float()
    plain.load_state_dict(exact, strict=False)
    if dist.get_rank() == 0:
        export(plain, to)
    dist.barrier()
    output: Tensor = plain(same_batch("lm", 0)).detach()
    assert not torch.equal(output, copy.deepcopy(model).float()(same_batch("lm", 0)))
    return output


def export_unwrapped(to: Path, options: dict[str, Any]) -> Tensor:
    model, optimizer = wrapped("lm", "adamw", options)
    train(model, optimizer)
    plain = zeroopt.unwrap(model)
    if dist.get_rank() == 0:
        export(plain, to)
    dist.barrier()
    output: Tensor = plain(same_batch("lm", 0)).detach()
    return output


@pytest.mark.parametrize(
    ("way", "options"),
    [
        (export_as_it_is, {"share_parameters": True}),
        (export_exactly, TIERS["remainder"]),
        (export_unwrapped, TIERS["remainder"]),
    ],
    ids=["shared parameters", "remainders", "unwrapped"],
)
def test_onnxruntime_computes_what_torch_does(
    way: Any, options: dict[str, Any], run_on_ranks: RunOnRanks, tmp_path: Path
) -> None:
    from onnx_files import run_onnx

    outputs = run_on_ranks(2, way, tmp_path / "model.onnx", options)
    assert torch.equal(*outputs)
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", same_batch("lm", 0)), outputs[0])
