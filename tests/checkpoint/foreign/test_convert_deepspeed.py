"""Checkpoints that DeepSpeed itself has written, in stages 1 and 2, continue under zeroopt."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed_rank
import pytest
import torch
import torch.distributed as dist
from deepspeed_rank import (
    CASES,
    CONTINUED,
    ROUND_ROBIN,
    SAVED_AFTER,
    UNIVERSAL,
    WORLD_SIZE,
    Said,
    adamw,
    inputs,
    loss_of,
    make_net,
)
from torch import Tensor, nn
from worker_pool import WORKER_ENVIRONMENT, RunOnRanks

import zeroopt
from zeroopt.checkpoint.foreign.convert_deepspeed import from_deepspeed
from zeroopt.checkpoint.foreign.inert_pickle import StandIn, load_inert
from zeroopt.errors import NotSupportedError, StateError
from zeroopt.state.shard_tensor import ShardTensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

TAG = f"global_step{SAVED_AFTER}"
# Name, and which of its checkpoints.
SAVED = [(name, TAG) for name in CASES if name != "stage3"] + [
    (name, "universal") for name in UNIVERSAL if name != ROUND_ROBIN
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of all cases, written by two ranks of a run under DeepSpeed."""
    folder = tmp_path_factory.mktemp("deepspeed")
    ranks = []
    for rank in range(WORLD_SIZE):
        environment = {**os.environ, **WORKER_ENVIRONMENT, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
        command = [sys.executable, deepspeed_rank.__file__, str(rank), str(WORLD_SIZE), str(folder)]
        with (folder / f"rank{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=200) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(WORLD_SIZE))
    assert codes == [0] * WORLD_SIZE, logs
    return folder


def said_of(folder: Path, name: str) -> Said:
    return Said(**torch.load(folder / f"{name}.said", weights_only=True))


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model that is not the saved one, and the optimizer of the run."""
    net = make_net()
    with torch.no_grad():
        for param in net.parameters():
            if param.requires_grad:
                param.fill_(7.0)
    return net, CASES[name].optimizer(net)


def convert(folder: Path, name: str, tag: str) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    net, optimizer = build(name)
    return net, optimizer, from_deepspeed(folder / name, net, optimizer, tag=tag)


def trained_positions(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {
        name: next(i for i, p in enumerate(params) if p is param)
        for name, param in net.named_parameters()
        if param.requires_grad
    }


# What is in a checkpoint.


@pytest.mark.parametrize(("name", "tag"), SAVED)
def test_state_is_what_deepspeed_says(folder: Path, name: str, tag: str) -> None:
    net, optimizer, saved = convert(folder, name, tag)
    said = said_of(folder, name)
    for key, value in said.masters.items():
        assert saved["model"][key].dtype is torch.float32
        assert torch.equal(saved["model"][key], value), key
    assert torch.equal(saved["model"]["out.weight"], said.masters["embed.weight"])
    positions = trained_positions(net, optimizer)
    assert sorted(saved["optimizer"]["state"]) == sorted(positions.values())
    for key, position in positions.items():
        state = saved["optimizer"]["state"][position]
        assert float(state.pop("step", 0)) == said.step
        assert state.keys() == said.state[key].keys()
        for entry, value in state.items():
            assert torch.equal(value, said.state[key][entry]), (key, entry)
    assert "deepspeed" not in sys.modules


@pytest.mark.parametrize(("name", "tag"), SAVED)
def test_plain_torch_loads_it(folder: Path, name: str, tag: str) -> None:
    net, optimizer, saved = convert(folder, name, tag)
    options = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    net.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert [{**group, "params": len(group["params"])} for group in optimizer.param_groups] == options
    original = dict(make_net().state_dict())
    for key in ("frozen.weight", "frozen.bias", "shift", "version"):
        rounded = original[key].bfloat16().float() if CASES[name].is_bf16 and "frozen" in key else original[key]
        assert torch.equal(net.state_dict()[key], rounded)
    step_counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    assert len({count.data_ptr() for count in step_counts}) == len(step_counts)  # optimizers add to them in place


def test_options_are_the_saved_ones(folder: Path) -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(adamw(net).param_groups, lr=1.0)
    for group in optimizer.param_groups:
        group.update(lr=9.0, betas=(0.1, 0.2), foreach=False)
    groups = from_deepspeed(folder / "stage1", net, optimizer)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [0.02, 0.01, 0.01]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.2, 0.1]
    assert all(group["betas"] == (0.8, 0.95) and group["foreach"] is False for group in groups)
    elastic = from_deepspeed(folder / "stage1_elastic", net, optimizer)["optimizer"]["param_groups"]
    assert [group["lr"] for group in elastic] == [9.0] * 3  # that has saved none


def test_groups_may_be_others_where_options_agree(folder: Path) -> None:
    net = make_net()
    params = dict(net.named_parameters())
    alike = [name for name in params if params[name].dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": [param]} for name, param in params.items() if name not in alike]
        + [{"params": [params[n] for n in alike]}]
    )
    saved = from_deepspeed(folder / "stage1", net, optimizer)["optimizer"]
    said = said_of(folder, "stage1")
    for name, position in trained_positions(net, optimizer).items():
        assert torch.equal(saved["state"][position]["exp_avg"], said.state[name]["exp_avg"])
    assert saved["param_groups"][-1]["lr"] == 0.02
    with pytest.raises(
        StateError, match=r"one param_group of the optimizer, .*weight_decay=0.0 and weight_decay=0..*make the groups"
    ):
        from_deepspeed(folder / "stage1", net, torch.optim.AdamW(net.parameters()))


def test_step_counts_of_deepspeeds_own_optimizers(copied: Path) -> None:
    """Its FusedAdam has had the count, a plain number, among the group's options, where `bias_correction` is too."""

    def move_step(saved: dict[str, Any], **options: Any) -> None:
        base = saved["optimizer_state_dict"]["base_optimizer_state"]
        for index, group in enumerate(base["param_groups"]):
            step = base["state"][index].pop("step", group.get("step"))
            group.update(step=int(step), **options)

    for rank in range(WORLD_SIZE):
        change(rank_file(copied, rank), lambda saved: move_step(saved, bias_correction=True))
    net, optimizer = build("stage1")
    saved = from_deepspeed(copied, net, optimizer)["optimizer"]
    assert all(torch.equal(state["step"], torch.tensor(3.0)) for state in saved["state"].values())
    assert not any("step" in group or "bias_correction" in group for group in saved["param_groups"])
    change(rank_file(copied, 0), lambda saved: move_step(saved, bias_correction=False))
    refused(copied, "bias_correction=False, which this one does not know")


def test_the_latest_checkpoint_is_found(folder: Path) -> None:
    net, optimizer = build("stage1")
    expected = said_of(folder, "stage1").masters["up.weight"]
    for path in (folder / "stage1", folder / "stage1" / TAG, folder / "stage1" / "universal"):
        assert torch.equal(from_deepspeed(path, net, optimizer)["model"]["up.weight"], expected)


def test_frozen_parameters_that_were_left_out_are_the_models(folder: Path) -> None:
    net, optimizer = build("stage2_aligned")
    with torch.no_grad():
        dict(net.named_parameters())["frozen.weight"].fill_(3.0)
    saved = from_deepspeed(folder / "stage2_aligned", net, optimizer)["model"]
    assert torch.equal(saved["frozen.weight"], torch.full((23, 23), 3.0))


def test_tensors_are_views_of_the_files(folder: Path) -> None:
    """But for the one parameter of each group of which both ranks have a part."""
    _, _, saved = convert(folder, "stage1", TAG)
    of_both = {"norm.weight", "down.weight", "embed.weight"}
    for name in said_of(folder, "stage1").masters:
        assert is_in_file(saved["model"][name]) == (name not in of_both), name
    _, _, saved = convert(folder, "stage1", "universal")
    for name in said_of(folder, "stage1").masters:
        assert is_in_file(saved["model"][name])


def is_in_file(value: Tensor) -> bool:
    """Whether the memory of a tensor is that of a checkpoint's file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if begin <= value.data_ptr() < end:
            return line.endswith(".pt")
    raise AssertionError("no such memory")


# Going on.


def piece(state_dict: dict[str, Any], position: int, key: str, shape: torch.Size) -> tuple[int, Tensor]:
    """A rank's elements of a parameter's state, and the first one's number."""
    value = state_dict["state"][position][key]
    if isinstance(value, ShardTensor):
        return value.start, value.local
    if value.shape == shape:
        return 0, value.flatten()
    return state_dict["zeroopt"]["ranges"][position][0], value


def check_loaded(net: nn.Module, optimizer: Any, said: Said) -> None:
    """Every rank's part of the state, and the masters, are exactly what DeepSpeed had."""
    state_dict = optimizer.state_dict()
    for name, param in net.named_parameters():
        if not param.requires_grad:
            continue
        assert torch.equal(optimizer.full_parameter(param), said.masters[name]), name
        position = trained_positions(net, optimizer)[name]
        for key, full in said.state[name].items() if state_dict["state"].get(position) else ():
            start, values = piece(state_dict, position, key, full.shape)
            assert torch.equal(values, full.flatten()[start : start + values.numel()]), (name, key)
            assert float(state_dict["state"][position].get("step", 0)) == said.step


def load(
    name: str, saved_in: tuple[Path, str], options: dict[str, Any], order: str
) -> tuple[nn.Module, nn.Module, Any]:
    """The model, the wrapped one, and its optimizer, with the state of a checkpoint.

    Args:
        order: when state is loaded: "before" wrapping, "after" it, or the optimizer's alone after it ("around").
    """
    net, inner = build(name)
    saved = from_deepspeed(saved_in[0] / name, net, inner, tag=saved_in[1])
    if order != "after":
        net.load_state_dict(saved["model"])
    if order == "before":
        inner.load_state_dict(saved["optimizer"])
    model, optimizer = zeroopt.wrap(net, inner, bucket_mb=0.002, **options)
    if order == "after":
        saved = from_deepspeed(saved_in[0] / name, model, optimizer, tag=saved_in[1])
        model.load_state_dict(saved["model"])
    if order != "before":
        optimizer.load_state_dict(saved["optimizer"])
    return net, model, optimizer


def go_on(folder: Path, name: str, tag: str, options: dict[str, Any], order: str) -> tuple[list[float], list[Tensor]]:
    """Losses of the steps that follow, and the masters after them, in DeepSpeed's order."""
    net, model, optimizer = load(name, (folder, tag), options, order)
    said = said_of(folder, name)
    check_loaded(net, optimizer, said)
    losses = []
    for step in range(SAVED_AFTER, SAVED_AFTER + CONTINUED):
        loss = loss_of(model(inputs(step, dist.get_rank(), dist.get_world_size())))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    params = dict(net.named_parameters())
    return losses, [optimizer.full_parameter(params[key]) for key in said.after]


def go_on_with_all(folder: Path, variants: list[tuple[Any, ...]]) -> list[tuple[list[float], list[Tensor]]]:
    return [go_on(folder, *variant) for variant in variants]


FLOAT32 = [(*saved, {"stage": 2}, "around") for saved in SAVED if not CASES[saved[0]].is_bf16] + [
    ("stage1", TAG, {"stage": 2, "fused": False}, "before"),
    (ROUND_ROBIN, TAG, {"stage": 1}, "after"),
    ("stage1_elastic", TAG, {"stage": 0}, "after"),
]
BF16 = [(*saved, {"param_dtype": torch.bfloat16}, "around") for saved in SAVED if CASES[saved[0]].is_bf16] + [
    ("stage2_bf16", TAG, {"param_dtype": torch.bfloat16, "stage": 1}, "before"),
    ("stage2_bf16", TAG, {"param_dtype": torch.bfloat16, "master_weights": "remainder"}, "around"),
]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_goes_on_as_under_deepspeed(run_on_ranks: RunOnRanks, folder: Path, world_size: int) -> None:
    for answers in run_on_ranks(world_size, go_on_with_all, folder, FLOAT32):
        for (name, *_), (losses, params) in zip(FLOAT32, answers, strict=True):
            said = said_of(folder, name)
            assert losses == pytest.approx(said.losses, rel=1e-5), name
            torch.testing.assert_close(params, list(said.after.values()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_masters_of_16_bit_parameters_go_on(run_on_ranks: RunOnRanks, folder: Path, world_size: int) -> None:
    for answers in run_on_ranks(world_size, go_on_with_all, folder, BF16):
        for (name, *_), (losses, params) in zip(BF16, answers, strict=True):
            said = said_of(folder, name)
            # Gradients of 16 bits: they are alike where ranks have the same batches, and DeepSpeed's too sums them in float32.
            is_alike = world_size == WORLD_SIZE and "data_types" in CASES[name].config
            assert losses == pytest.approx(said.losses, rel=1e-5 if is_alike else 1e-2), name
            if is_alike:
                torch.testing.assert_close(params, list(said.after.values()), rtol=1e-5, atol=1e-6)


# What is refused.


def refused(path: Path, message: str, error: type[Exception] = StateError, **options: Any) -> None:
    net, optimizer = build("stage1")
    with pytest.raises(error, match=message):
        from_deepspeed(path, net, optimizer, **options)


def rank_file(folder: Path, rank: int) -> Path:
    return folder / TAG / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    shutil.copytree(folder / "stage1", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_file_is_named(copied: Path, rank: int) -> None:
    rank_file(copied, rank).unlink()
    refused(copied, f"{rank_file(copied, rank).name}")


def test_a_missing_model_or_checkpoint_is_named(copied: Path) -> None:
    refused(copied / "elsewhere", r"no directory .*elsewhere")
    refused(copied, rf"no checkpoint 'other' in .*{TAG}.*universal", tag="other")
    (copied / TAG / "mp_rank_00_model_states.pt").unlink()
    refused(copied, r"no file .*mp_rank_00_model_states.pt")
    (copied / "latest").unlink()
    (copied / "latest_universal").unlink()
    refused(copied, r"file 'latest': pass the directory of a checkpoint, or its tag")
    for rank in range(WORLD_SIZE):
        rank_file(copied, rank).unlink()
    refused(copied, r"has no '…zero_pp_rank_.*did not use ZeRO", tag=TAG)


@pytest.mark.parametrize("kept", [0, 100, -1])
@pytest.mark.parametrize("name", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_a_file_that_is_cut_off_is_named(copied: Path, name: str, kept: int) -> None:
    path = copied / TAG / name
    path.write_bytes(path.read_bytes()[:kept])
    refused(copied, rf"cannot read .*{name} .*cut off")


def test_damage_to_a_universal_checkpoint_is_named(copied: Path) -> None:
    universal = copied / "universal"
    (universal / "zero" / "up.bias" / "exp_avg.pt").unlink()
    refused(universal, r"up.bias has files of \['exp_avg_sq', 'step'\]")
    shutil.copy(universal / "zero" / "up.weight" / "fp32.pt", universal / "zero" / "up.bias" / "fp32.pt")
    refused(universal, r"up.bias.fp32.pt holds a tensor of shape .23, 18., expected 23 elements of parameter 'up.bias'")
    (universal / "zero" / "up.bias" / "fp32.pt").unlink()
    refused(universal, r"no file .*up.bias.fp32.pt")
    (universal / "zero" / "optimizer_state.pt").unlink()
    refused(universal, r"no file .*optimizer_state.pt")


def change(path: Path, function: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a file holds; objects of DeepSpeed's classes become the values that they were made of."""
    saved = load_inert(path)
    function(saved)
    replaced = path.with_suffix(".new")
    torch.save(_without_stand_ins(saved), replaced)
    replaced.replace(path)


def _without_stand_ins(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_stand_ins(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_stand_ins(part) for part in value]
    return next(iter(value.args), None) if isinstance(value, StandIn) else value


def test_other_layouts_are_refused_by_key_and_version(copied: Path) -> None:
    path = rank_file(copied, 1)
    change(path, lambda saved: saved["optimizer_state_dict"].update(zero_stage=2, group_paddings=None))
    refused(copied, rf"{path.name}, written by DeepSpeed \d[\d.]+, has no 'group_paddings'")
    change(copied / TAG / "mp_rank_00_model_states.pt", lambda saved: saved.update(mp_world_size=2))
    refused(copied, r"mp_world_size 2.*not supported", NotSupportedError)


def test_files_of_different_saves_are_refused(folder: Path, copied: Path) -> None:
    path = rank_file(copied, 1)
    change(path, lambda saved: saved["optimizer_state_dict"]["base_optimizer_state"]["state"][1].update(step=7.0))
    refused(copied, rf"{path.name} has step 7.0 in group 1, .*rank_0_.* has 3.0: they are not of one save")
    change(path, lambda saved: saved["optimizer_state_dict"]["base_optimizer_state"]["state"][1].pop("exp_avg"))
    refused(copied, rf"{path.name} has state \['exp_avg_sq', 'step'\] in group 1")
    shutil.copy(rank_file(folder / "stage1_amsgrad", 1), path)
    refused(copied, r"'norm.weight' in float32 and .* of different saves")
    change(path, lambda saved: saved["optimizer_state_dict"]["single_partition_of_fp32_groups"].append(torch.zeros(3)))
    refused(copied, rf"{path.name} has 4 param_groups in its masters, the file of the model has 3")
    shutil.copy(rank_file(folder / ROUND_ROBIN, 1), copied / TAG / f"bf16_{path.name}")
    refused(copied, r"files of several runs, bf16_zero_pp_rank_… and zero_pp_rank_…")


def test_a_universal_checkpoint_that_is_mixed_up_is_refused(folder: Path) -> None:
    """DeepSpeed writes such ones of runs with `round_robin_gradients`."""
    refused(
        folder / ROUND_ROBIN / "universal",
        r"'norm.weight' in float32 and .* differ by more than rounding.*round_robin_gradients",
    )


def test_stage_3_and_parallel_models_are_refused(folder: Path, copied: Path) -> None:
    refused(folder / "stage3", r"stage 3.*ds_to_universal", NotSupportedError)
    (copied / TAG / "mp_rank_01_model_states.pt").touch()
    refused(copied, r"mp_rank_01_model_states.pt belongs to a model that was split", NotSupportedError)


def test_other_models_are_refused(folder: Path) -> None:
    path = folder / "stage1"

    def attempt(net: nn.Module, message: str, params: Any = None) -> None:
        before = {key: value.clone() for key, value in net.state_dict().items()}
        optimizer = torch.optim.AdamW(net.parameters() if params is None else params, lr=0.5)
        with pytest.raises(StateError, match=message):
            from_deepspeed(path, net, optimizer)
        assert not optimizer.state
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())

    attempt(nn.ModuleDict({"module": make_net()}), r"parameter 'scale', the model has not: .*'module.scale'")
    wider = make_net()
    wider.get_submodule("down").weight = nn.Parameter(torch.zeros(18, 24))
    attempt(wider, r"'down.weight' of shape \[18, 23\], the model has \[18, 24\]")
    more = make_net()
    more.add_module("more", nn.Linear(2, 2))
    attempt(more, r"has no 'more.weight', which the model has")
    other_buffer = make_net()
    other_buffer.register_buffer("shift", torch.zeros(5))
    attempt(
        other_buffer, r"'module' of shape \[23\] for parameter 'shift' of shape \[5\]", adamw(other_buffer).param_groups
    )
    net = make_net()
    attempt(net, r"parameter 'scale', which is not one of the optimizer's", [net.get_parameter("up.weight")])
