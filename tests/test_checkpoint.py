"""zeroopt.checkpoint: what is saved is what is loaded, at any world size, stage, bucket size and precision, here and in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training import build, loss_of, optimizer_for
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint

BF16 = torch.bfloat16
TIERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "master": {"param_dtype": BF16},
    "remainder": {"param_dtype": BF16, "master_weights": "remainder"},
    "none": {"param_dtype": BF16, "master_weights": "none"},
    "int8": {"param_dtype": BF16, "master_weights": "remainder", "state_dtype": torch.int8},
    "bfloat16 state": {"state_dtype": BF16},
}


def wrapped(
    model_name: str, optimizer_name: str, options: dict[str, Any]
) -> tuple[zeroopt.ZeroDataParallel, zeroopt.ZeroOptimizer]:
    torch.manual_seed(7)
    net = build(model_name)
    return zeroopt.wrap(net, optimizer_for(optimizer_name, net, groups=2), **options)


def same_batch(model_name: str, step: int) -> Tensor:
    """The same on all ranks, so that their number does not matter."""
    generator = torch.Generator().manual_seed(step)
    if model_name == "lm":
        return torch.randint(0, 37, (4, 6), generator=generator)
    return torch.randn((4, 7) if model_name == "mlp" else (4, 3, 8, 8), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, model_name: str, steps: range) -> None:
    for step in steps:
        x = same_batch(model_name, step)
        dtype = next(model.parameters()).dtype
        loss_of(model(x.to(dtype) if x.is_floating_point() else x).float()).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_of(
    model: zeroopt.ZeroDataParallel, optimizer: zeroopt.ZeroOptimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Exact parameters by name, and the whole state, on all ranks."""
    params = {n: optimizer.full_parameter(p) for n, p in model.named_parameters() if p.requires_grad}
    everyone: list[Any] = [None]
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        everyone = [optimizer.full_state_dict()]
    dist.broadcast_object_list(everyone)
    return params, everyone[0]


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def save_one(path: str, case: tuple[str, str], options: dict[str, Any]) -> Any:
    model, optimizer = wrapped(*case, options)
    train(model, optimizer, case[0], range(2))
    zeroopt.checkpoint.save(path, model, optimizer, {"epoch": 3})
    return whole_of(model, optimizer)


def load_one(path: str, case: tuple[str, str], options: dict[str, Any]) -> Any:
    model, optimizer = wrapped(*case, options)
    for group in optimizer.param_groups:
        group["lr"] = 123.0
    assert zeroopt.checkpoint.load(path, model, optimizer) == {"epoch": 3}
    return whole_of(model, optimizer)


CASES = [("lm", "adamw_amsgrad"), ("conv", "sgd_momentum"), ("mlp", "rmsprop"), ("mlp", "sgd")]


@pytest.mark.parametrize("case", CASES)
def test_any_layout_loads_any_other(run_on_ranks: RunOnRanks, tmp_path: Path, case: tuple[str, str]) -> None:
    for number, (world_size, options) in enumerate(
        [(3, {"stage": 2, "bucket_mb": 0.002}), (2, {"stage": 1}), (2, {"stage": 0}), (1, {"stage": 2})]
    ):
        path = str(tmp_path / str(number))
        saved = run_on_ranks(world_size, save_one, path, case, options)[0]
        for other_size, other_options in [
            (1, {"stage": 2}),
            (2, {"stage": 0}),
            (2, {"stage": 2, "bucket_mb": 0.001}),
            (3, {"stage": 1}),
        ]:
            for loaded in run_on_ranks(other_size, load_one, path, case, other_options):
                assert_same(loaded, saved)
