"""Checkpoints of models whose parts are on different ranks: tensor parallelism, pipeline stages, and replicas that train alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import assert_all_same, assert_same, wrapped
from checkpoints import train as train_same
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint
from zeroopt.checkpoint.format.reading import open_checkpoint
from zeroopt.errors import CheckpointError

if not hasattr(pytest.importorskip("torch.distributed.tensor"), "DTensor"):
    pytest.skip("needs torch 2.5", allow_module_level=True)

import parallel
from parallel import Mesh, loss_of, make_mesh, tokens, whole, wrap_split

from tests.training.test_pipeline import Back, Front

Wrapped = tuple[nn.Module, zeroopt.ZeroDataParallel, zeroopt.ZeroOptimizer]

BF16 = torch.bfloat16
SPLIT_OPTIONS: list[dict[str, Any]] = [
    {"stage": 1},
    {"stage": 2, "param_dtype": BF16},
    {"stage": 0, "fused": False},
    {"param_dtype": BF16, "master_weights": "remainder", "state_dtype": torch.int8},
]


def make_split(mesh: Mesh | None, plan: str, options: dict[str, Any]) -> Wrapped:
    """Over a mesh with a "tp" dimension, or without one."""
    if mesh is not None:
        return wrap_split(plan, mesh, **options)
    net = parallel.build()
    return net, *zeroopt.wrap(net, parallel.adamw(net.parameters()), bucket_mb=0.003, **options)


def train_split(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """On the same batch on all ranks."""
    for step in steps:
        batch = tokens(step, 0)
        loss_of(model(batch), batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(net: nn.Module, optimizer: zeroopt.ZeroOptimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Exact parameters and moments in full, by name."""
    params = {name: whole(optimizer.full_parameter(param)) for name, param in net.named_parameters()}
    optimizer.consolidate_state_dict()
    shared: list[Any] = [None]
    group = optimizer.replica.group
    if group.rank() == 0:
        shared = [optimizer.full_state_dict()["state"]]
        # A DTensor of the state has all of it in its mesh, which the other ranks of the group are not in.
        shared = [{p: {n: whole(v) for n, v in entry.items()} for p, entry in shared[0].items()}]
    dist.broadcast_object_list(shared, dist.get_global_rank(group, 0), group=group)
    names = optimizer.names()
    return params, {names[position]: entry for position, entry in shared[0].items()}


def mesh_of(sizes: dict[str, int] | None) -> Mesh | None:
    return None if sizes is None else make_mesh(**sizes)


def save_split(path: Path, sizes: dict[str, int] | None, plan: str) -> list[Any]:
    mesh = mesh_of(sizes)
    saved = []
    for number, options in enumerate(SPLIT_OPTIONS):
        net, model, optimizer = make_split(mesh, plan, options)
        train_split(model, optimizer, range(2))
        zeroopt.checkpoint.save(path / str(number), model, optimizer, {"epoch": number})
        saved.append(everything(net, optimizer))
    return saved


def load_split(path: Path, sizes: dict[str, int] | None, plan: str) -> list[Any]:
    mesh = mesh_of(sizes)
    loaded = []
    for number, options in enumerate(SPLIT_OPTIONS):
        net, model, optimizer = make_split(mesh, plan, options)
        assert zeroopt.checkpoint.load(path / str(number), model, optimizer) == {"epoch": number}
        loaded.append(everything(net, optimizer))
        if sizes is None or sizes["tp"] == 2:  # the batch has too few tokens to train on four ranks
            train_split(model, optimizer, range(2, 3))
    return loaded


@pytest.mark.parametrize("plan", ["tensor", "sequence"])
def test_tensor_parallelism_loads_at_any_mesh(run_on_ranks: RunOnRanks, tmp_path: Path, plan: str) -> None:
    saved = run_on_ranks(4, save_split, tmp_path, {"dp": 2, "tp": 2}, plan)
    assert_all_same(saved, saved[0])
    for world_size, sizes in ((4, {"dp": 1, "tp": 4}), (2, {"dp": 1, "tp": 2}), (4, None), (1, None)):
        assert_all_same(run_on_ranks(world_size, load_split, tmp_path, sizes, plan), saved[0])


def test_whole_models_load_into_split_ones(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    saved = run_on_ranks(3, save_split, tmp_path, None, "tensor")[0]
    assert_all_same(run_on_ranks(4, load_split, tmp_path, {"dp": 2, "tp": 2}, "tensor"), saved)


# Pipeline stages.


def make_stages(names: str) -> Wrapped:
    """Stages of two data-parallel ranks each; with names alike they have parameters of the same name."""
    mesh = make_mesh(pp=2, dp=2)
    net = parallel.build()
    stage: nn.Module = Front(net) if mesh["pp"].get_local_rank() == 0 else Back(net)
    if names == "alike":
        stage = nn.Sequential(nn.Linear(4, 5))
    group = mesh["dp"].get_group()
    factory = parallel.adamw if names == "different" else parallel.sgd
    return stage, *zeroopt.wrap(stage, factory(stage.parameters()), process_group=group, bucket_mb=0.003)


def step_stage(stage: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = tokens(step, 0) if isinstance(stage, Front) else torch.full((2, 3, parallel.WIDTH), 0.1 * (1 + step))
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_stages(path: Path) -> Any:
    stage, model, optimizer = make_stages("different")
    for group in optimizer.param_groups:
        group["lr"] = 0.01 if isinstance(stage, Front) else 0.02
    for step in range(2):
        step_stage(stage, model, optimizer, step)
    zeroopt.checkpoint.save(path, model, optimizer)
    return everything(stage, optimizer), isinstance(stage, Front)


def load_stages(path: Path) -> Any:
    stage, model, optimizer = make_stages("different")
    zeroopt.checkpoint.load(path, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == (0.01 if isinstance(stage, Front) else 0.02)
    return everything(stage, optimizer), isinstance(stage, Front)


def load_all_stages(path: Path) -> Any:
    """Into the whole model, of which each stage has its own learning rate."""
    net = parallel.build()
    front, back = ([param for stage in stages for param in stage.parameters()] for stages in halves(net))
    groups = [{"params": front}, {"params": back}, {"params": [net.scale]}]
    model, optimizer = zeroopt.wrap(net, parallel.adamw(groups), bucket_mb=0.003)
    zeroopt.checkpoint.load(path, model, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02, 0.02]
    return everything(net, optimizer)


def halves(net: parallel.Transformer) -> tuple[list[nn.Module], list[nn.Module]]:
    return [net.embed, net.block], [net.norm, net.head]


def test_pipeline_stages_make_one_checkpoint(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    saved = run_on_ranks(4, save_stages, tmp_path / "one")
    assert [is_front for _, is_front in saved] == [True, True, False, False]
    assert_same(run_on_ranks(4, load_stages, tmp_path / "one"), saved)
    (front, _), _, (back, _), _ = saved
    expected = [{**a, **b} for a, b in zip(front, back, strict=True)]
    for loaded in run_on_ranks(2, load_all_stages, tmp_path / "one"):
        assert_same(list(loaded), expected)


def error_of_stages(path: Path) -> str:
    _, model, optimizer = make_stages("alike")
    with pytest.raises(CheckpointError) as raised:
        zeroopt.checkpoint.save(path, model, optimizer)
    # Each on its own is fine.
    group = optimizer.replica.group
    own = path / str(dist.get_rank() - group.rank())
    zeroopt.checkpoint.save(own, model, optimizer, process_group=group)
    zeroopt.checkpoint.load(own, model, optimizer, process_group=group)
    return str(raised.value)


def test_stages_with_the_same_names_are_refused(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    errors = run_on_ranks(4, error_of_stages, tmp_path)
    assert len(set(errors)) == 1
    assert "begin with rank 0 and with rank 2 both have '0.weight'" in errors[0]


# Ranks that train alone.


def save_alone(path: Path, grouped: bool) -> tuple[str, bool]:
    """The error of saving together; each rank, or each group of two, then saves and loads on its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])] if grouped else [dist.new_group([r]) for r in range(4)]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    options: dict[str, Any] = {"average_every": 5}
    if grouped:
        options |= {"process_group": groups[rank // 2], "average_group": across[rank % 2]}
    group = groups[rank // 2 if grouped else rank]
    model, optimizer = wrapped("conv", "adamw", options)
    train_same(model, optimizer, "conv", range(rank // 2, rank // 2 + 2))
    with pytest.raises(CheckpointError) as raised:
        zeroopt.checkpoint.save(path / "all", model, optimizer)
    own = path / f"{rank // 2 if grouped else rank}"
    zeroopt.checkpoint.save(own, model, optimizer, process_group=group)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    train_same(model, optimizer, "conv", range(1))
    zeroopt.checkpoint.load(own, model, optimizer, process_group=group)
    assert_same(dict(model.state_dict()), saved)
    assert optimizer.state_dict()["zeroopt"]["steps_since_average"] == 2
    assert len(open_checkpoint(own).metadata.state_dict_metadata) > 20
    return str(raised.value), (path / "all").exists()


@pytest.mark.parametrize("grouped", [False, True])
def test_replicas_that_train_alone_are_saved_alone(run_on_ranks: RunOnRanks, tmp_path: Path, grouped: bool) -> None:
    for error, exists in run_on_ranks(4, save_alone, tmp_path, grouped):
        assert "with its process_group and a path of its own" in error
        assert not exists


def error_of_groups(path: Path) -> list[str]:
    """A process group without some of the model's ranks."""
    model, optimizer = wrapped("mlp", "sgd", {})
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    errors = []
    for call in (zeroopt.checkpoint.save, zeroopt.checkpoint.load):
        with pytest.raises(CheckpointError) as raised:
            call(path, model, optimizer, process_group=alone)
        errors.append(str(raised.value))
    return errors


def test_groups_without_some_of_the_ranks_are_refused(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for rank, errors in enumerate(run_on_ranks(2, error_of_groups, tmp_path)):
        assert all(f"wrapped on rank {1 - rank} too" in error for error in errors)
