"""torch.distributed.checkpoint on the model and the optimizers as they are, as torch's own documentation has it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from state_cases import TIERS, Run, assert_alike, whole_state
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from training import prepare_all
from worker_pool import RunOnRanks

import zeroopt

NAMES = ["adamw_amsgrad", "rmsprop_centered", "lars", "sgd_momentum"]


class AppState(Stateful):
    """As in torch's tutorial."""

    def __init__(self, run: Run, **options: Any) -> None:
        self.run, self.options = run, StateDictOptions(**options)

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.run.model, self.run.optimizer, options=self.options)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.run.model,
            self.run.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
            options=self.options,
        )


OPTIONS: list[dict[str, Any]] = [{}, {"cpu_offload": True}, {"flatten_optimizer_state_dict": True}]


def options_of(name: str) -> list[int]:
    """All for the first optimizer, and one for each other."""
    place = NAMES.index(name)
    return [place % len(OPTIONS)] if place else list(range(len(OPTIONS)))


def save_apps(path: str, layout: dict[str, Any], steps: int) -> dict[str, Any]:
    result = {}
    for name in NAMES:
        run = Run(name, layout, unused=False)
        run.train(steps, same=True)
        for number in options_of(name):
            dcp.save({"app": AppState(run, **OPTIONS[number])}, checkpoint_id=f"{path}/{name}-{number}")
        result[name] = run.params(), whole_state(run.optimizer)
    return result


def load_apps(path: str, layout: dict[str, Any], steps: int, saved: dict[str, Any]) -> None:
    for name in NAMES:
        for number in options_of(name):
            run = Run(name, layout, unused=False)
            run.train(steps)
            dcp.load({"app": AppState(run, **OPTIONS[number])}, checkpoint_id=f"{path}/{name}-{number}")
            assert_alike(saved[name], (run.params(), whole_state(run.optimizer)), f"{name}, {OPTIONS[number]}")


LAYOUTS: list[tuple[int, dict[str, Any], int]] = [
    (3, {"stage": 2, "bucket_mb": 0.001}, 3),
    (2, {"stage": 0}, 3),
    (1, {"stage": 1}, 0),
]


def test_an_app_state_goes_anywhere(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    size, layout, steps = LAYOUTS[0]
    saved = run_on_ranks(size, save_apps, str(tmp_path), layout, steps)[0]
    for size, layout, steps in [*LAYOUTS, (4, {"stage": 2}, 0)]:
        run_on_ranks(size, load_apps, str(tmp_path), layout, steps, saved)


def in_place(path: str, layouts: list[dict[str, Any]], steps: int) -> None:
    """`optimizer.state_dict()` as it is, filled where it stands."""
    for number, layout in enumerate(layouts):
        for tier in ({}, TIERS["master"], TIERS["remainder"], TIERS["int8"]):
            run = Run("adamw", {**layout, **tier}, unused=False)
            run.train(3, same=True)
            where = f"{path}/{number}-{'-'.join(map(str, tier.values()))}"
            dcp.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, checkpoint_id=where)
            other = Run("adamw", {**layout, **tier, "bucket_mb": 0.003}, unused=False)
            other.train(steps)
            state = {"model": other.model.state_dict(), "optimizer": other.optimizer.state_dict()}
            dcp.load(state, checkpoint_id=where)
            other.model.load_state_dict(state["model"])
            other.optimizer.load_state_dict(state["optimizer"])
            assert_alike(run.params(), other.params())
            assert_alike(whole_state(run.optimizer)["state"], whole_state(other.optimizer)["state"])


def asynchronous(path: str) -> None:
    """What is trained while it is being written does not matter."""
    run = Run("adamw", {"stage": 2, "bucket_mb": 0.001}, unused=False)
    run.train(3)
    expected = run.params(), whole_state(run.optimizer)
    saving = dcp.async_save({"app": AppState(run)}, checkpoint_id=path)
    run.train(2)
    saving.result()
    other = Run("adamw", {"stage": 1}, unused=False)
    dcp.load({"app": AppState(other)}, checkpoint_id=path)
    assert_alike(expected, (other.params(), whole_state(other.optimizer)))


def full_state() -> None:
    """Whole tensors are gathered by other means. Loading them works where every rank has them."""
    run = Run("adamw", {"stage": 2, "bucket_mb": 0.001}, unused=False)
    run.train(3)
    names = [name for name, param in run.net.named_parameters() if param.requires_grad]
    expected = whole_state(run.optimizer)["state"]
    for cpu_offload in (False, True):
        options = StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
        state = get_optimizer_state_dict(run.model, run.optimizer, options=options)
        if not cpu_offload or dist.get_rank() == 0:
            assert sorted(state["state"]) == sorted(names)
            assert_alike(expected, dict(zip(expected, (state["state"][name] for name in names), strict=True)))
    assert_alike(
        dict(run.model.state_dict()), get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True))
    )
    plain = Run("adamw", None, unused=False)
    plain.train(3)
    options = StateDictOptions(full_state_dict=True)
    model, optimizer = get_state_dict(plain.model, plain.optimizer, options=options)
    for stage in (0, 2):
        other = Run("adamw", {"stage": stage, "bucket_mb": 0.001}, unused=False)
        other.train(3)
        set_model_state_dict(other.model, copy.deepcopy(model))
        set_optimizer_state_dict(other.model, other.optimizer, copy.deepcopy(optimizer))
        assert_alike(plain.params(), other.params())
        assert_alike(plain.optimizer.state_dict()["state"], whole_state(other.optimizer)["state"])
    for broadcast in (False, True):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        with pytest.raises(zeroopt.NotSupportedError, match="give the full state dict on every rank"):
            set_optimizer_state_dict(run.model, run.optimizer, copy.deepcopy(optimizer), options=options)


def in_memory() -> None:
    """From an optimizer into another one, nested and flat: training goes on bit for bit in every tier."""
    flat: dict[str, Any] = {"flatten_optimizer_state_dict": True}
    for tier in map(
        TIERS.__getitem__, ("master", "remainder", "int8", "bfloat16 without master", "int8 with remainder")
    ):
        for options in ({}, flat):
            run, other = (Run("adamw", {"stage": 2, "bucket_mb": 0.001, **tier}, unused=False) for _ in range(2))
            has_masters = "param_dtype" in tier and tier.get("master_weights") != "none"
            run.train(2 if has_masters else 3)  # in two steps, one layer has not been used: torch wants state of all
            saved = AppState(run, **options).state_dict()
            saved["model"] = {name: value.clone() for name, value in saved["model"].items()}
            other.train(1)
            other.optimizer.state.clear()
            AppState(other, **options).load_state_dict(saved)
            assert_alike(
                [run.optimizer.full_parameter(p) for p in run.net.parameters() if p.requires_grad],
                [other.optimizer.full_parameter(p) for p in other.net.parameters() if p.requires_grad],
            )
            run.step = other.step = 3
            run.train(2)
            other.train(2)
            assert_alike(run.params(), other.params(), f"{tier}, {options}")


def into_other_tiers() -> None:
    """Flattened state: torch asks for the names that the loading optimizer has, and not for what completes parameters there."""
    flat = {"flatten_optimizer_state_dict": True}
    pairs = [("remainder", "master"), ("master", "float32"), ("int8", "float32"), ("float32", "int8")]
    for source, target in pairs:
        run = Run("adamw", {"stage": 2, "bucket_mb": 0.001, **TIERS[source]}, unused=False)
        run.train(3)
        other = Run("adamw", {"stage": 2, "bucket_mb": 0.001, **TIERS[target]}, unused=False)
        other.train(3)
        saved = AppState(run, **flat).state_dict()
        saved["optimizer"] = _whole_flat(run)  # shards are cut otherwise
        saved["model"] = {name: value.clone() for name, value in saved["model"].items()}
        set_model_state_dict(
            other.model, saved["model"]
        )  # set_state_dict takes it last, which is too late for remainders
        options = StateDictOptions(**flat)
        set_optimizer_state_dict(other.model, other.optimizer, saved["optimizer"], options=options)
        for (name, one), two in zip(run.net.named_parameters(), other.net.parameters(), strict=True):
            if one.requires_grad:
                assert_alike(
                    run.optimizer.full_parameter(one),
                    other.optimizer.full_parameter(two),
                    f"{source}, {target}, {name}",
                )


def _whole_flat(run: Run) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
    state: dict[str, Any] = get_optimizer_state_dict(run.model, run.optimizer, options=options)
    return state


def two_optimizers(path: str) -> None:
    torch.manual_seed(0)

    def build(stage: int) -> tuple[nn.Module, list[Any]]:
        net = nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 5))
        momentum = torch.optim.SGD(net[1].parameters(), lr=0.1, momentum=0.9)
        return prepare_all(net, [torch.optim.AdamW(net[0].parameters()), momentum], {"stage": stage})

    for options in OPTIONS:
        where = path + "-".join(options)
        model, optimizers = build(2)
        for _ in range(2):
            model(torch.ones(2, 33)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        state = get_optimizer_state_dict(model, optimizers, options=StateDictOptions(**options))
        dcp.save({"optimizer": state}, checkpoint_id=where)
        other, others = build(1)
        state = get_optimizer_state_dict(other, others, options=StateDictOptions(**options))
        dcp.load({"optimizer": state}, checkpoint_id=where)
        set_optimizer_state_dict(other, others, state, options=StateDictOptions(**options))
        for one, two in zip(optimizers, others, strict=True):
            assert_alike(whole_state(one), whole_state(two))


def test_state_dicts_in_place(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(3, in_place, str(tmp_path), [{"stage": 2, "bucket_mb": 0.001}, {"stage": 0}], 3)


def test_other_ways(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, in_memory)
    run_on_ranks(2, into_other_tiers)
    run_on_ranks(3, full_state)
    run_on_ranks(3, two_optimizers, str(tmp_path / "two"))
    run_on_ranks(3, asynchronous, str(tmp_path / "async"))
