"""torch.distributed.checkpoint on the model and the optimizers as they are, as torch's own documentation has it."""

from __future__ import annotations

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


def save_apps(path: str, layout: dict[str, Any], steps: int) -> dict[str, Any]:
    result = {}
    for name in NAMES:
        for number, options in enumerate(OPTIONS):
            run = Run(name, layout, unused=False)
            run.train(steps, same=True)
            dcp.save({"app": AppState(run, **options)}, checkpoint_id=f"{path}/{name}-{number}")
            result[f"{name}-{number}"] = run.params(), whole_state(run.optimizer)
    return result


def load_apps(path: str, layout: dict[str, Any], steps: int) -> dict[str, Any]:
    result = {}
    for name in NAMES:
        for number, options in enumerate(OPTIONS):
            run = Run(name, layout, unused=False)
            run.train(steps)
            dcp.load({"app": AppState(run, **options)}, checkpoint_id=f"{path}/{name}-{number}")
            result[f"{name}-{number}"] = run.params(), whole_state(run.optimizer)
    return result


LAYOUTS: list[tuple[int, dict[str, Any], int]] = [
    (3, {"stage": 2, "bucket_mb": 0.001}, 3),
    (2, {"stage": 0}, 3),
    (1, {"stage": 1}, 0),
]


def test_an_app_state_goes_anywhere(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    size, layout, steps = LAYOUTS[0]
    saved = run_on_ranks(size, save_apps, str(tmp_path), layout, steps)[0]
    for size, layout, steps in [*LAYOUTS, (4, {"stage": 2}, 0)]:
        for loaded in run_on_ranks(size, load_apps, str(tmp_path), layout, steps):
            assert_alike(saved, loaded)
