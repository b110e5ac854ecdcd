"""Training that was interrupted goes on bit for bit, with whatever belongs to it, in new processes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import TIERS, assert_same, wrapped
from measure import run_fresh
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from training import loss_of
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint

pytestmark = pytest.mark.slow

STEPS = 8
INTERRUPTED_AFTER = 5

Schedule = Callable[[Optimizer], Any]

SCHEDULES: dict[str, Schedule] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.01, 0.02], STEPS + 1),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [2, 6], 0.5),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5, threshold=0.5),
}

# Name: optimizer, options of zeroopt.wrap, schedule, whether gradients are scaled.
RUNS: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "float32": ("adamw_amsgrad", {}, "lambda", False),
    "clipped": ("adamw", {"max_grad_norm": 0.5, "stage": 1}, "one cycle", False),
    "float16": ("adamw", {"param_dtype": torch.float16}, "sequential", True),
    "float16, own steps": ("sgd_momentum", {"param_dtype": torch.float16, "fused": False}, "plateau", True),
    "stage 0": ("rmsprop", {"stage": 0, "fused": False}, "multi-step", False),
    **{tier: ("adamw", TIERS[tier], "lambda", False) for tier in ("remainder", "none", "int8", "bfloat16 state")},
}


class Random:
    """The states of the random number generators of this process."""

    def state_dict(self) -> dict[str, Any]:
        version, words, following = random.getstate()
        return {"torch": torch.get_rng_state(), "python": [version, list(words), following]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        version, words, following = state["python"]
        random.setstate((version, tuple(words), following))


class Run:
    """One training run, with dropout and gradients that accumulate over two batches, and all that has to be saved of it."""

    def __init__(self, name: str, **options: Any) -> None:
        optimizer, its_options, schedule, scales = RUNS[name]
        self.model, self.optimizer = wrapped("mlp", optimizer, {"bucket_mb": 0.003, **its_options, **options})
        self.model.module.layers[1] = nn.Dropout(0.3)
        self.scheduler = SCHEDULES[schedule](self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2, enabled=scales)
        self.step = 0
        torch.manual_seed(100 + dist.get_rank())
        random.seed(dist.get_rank())

    @property
    def extra(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, "step": self.step, **self._scaler}

    @property
    def _scaler(self) -> dict[str, Any]:
        return {"scaler": self.scaler} if self.scaler.is_enabled() else {}

    def save(self, path: Path, **options: Any) -> None:
        zeroopt.checkpoint.save(
            path, self.model, self.optimizer, self.extra, rank_extra={"random": Random()}, **options
        )

    def load(self, path: Path) -> None:
        loaded = zeroopt.checkpoint.load(path, self.model, self.optimizer, self.extra, rank_extra={"random": Random()})
        self.step = loaded["step"]

    def train(self, stop: int, *, same_data: bool = False) -> list[Any]:
        """Up to a step; returns all that shows, after each."""
        seen = []
        dtype = next(self.model.parameters()).dtype
        while self.step < stop:
            for part in range(2):
                seed = 1000 * self.step + 10 * part + (0 if same_data else dist.get_rank())
                x = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed)) * (1 + random.random())
                with self.model.no_sync() if part == 0 else torch.enable_grad():
                    loss = loss_of(self.model(x.to(dtype)).float())
                    self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(1.0)
            else:
                self.scheduler.step()
            self.optimizer.zero_grad()
            self.step += 1
            seen.append((self.values(), loss.item(), [g["lr"] for g in self.optimizer.param_groups]))
        return seen

    def values(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}


def train_through(path: Path) -> dict[str, Any]:
    """What follows after the moment at which the checkpoints are saved."""
    following = {}
    for name in RUNS:
        run = Run(name)
        run.train(INTERRUPTED_AFTER)
        run.save(path / name)
        following[name] = run.train(STEPS)
    return following


def train_on(path: Path) -> dict[str, Any]:
    following = {}
    for name in RUNS:
        run = Run(name)
        run.load(path / name)
        assert run.step == INTERRUPTED_AFTER
        following[name] = run.train(STEPS)
    return following


@pytest.mark.parametrize("world_size", [2, 3])
def test_resumed_training_gives_the_same_bits(tmp_path: Path, world_size: int) -> None:
    expected = run_fresh(world_size, train_through, tmp_path)
    for rank, following in enumerate(run_fresh(world_size, train_on, tmp_path)):
        for name in RUNS:
            assert_same(following[name], expected[rank][name], f"{name}, rank {rank}")


# At another world size.


def quiet(run: Run) -> Run:
    """Without what depends on the rank."""
    run.model.module.layers[1] = nn.Identity()
    random.seed(5)
    return run


def train_plain(path: Path, save: bool) -> Any:
    run = quiet(Run("float32", transport="torch"))
    if save:
        run.train(INTERRUPTED_AFTER, same_data=True)
        run.save(path)
    else:
        run.load(path)
        random.seed(6)
    random.seed(6)
    return run.train(STEPS, same_data=True)[-1]


def test_resumed_training_at_another_world_size(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    """Up to the order of sums."""
    values, loss, rates = run_on_ranks(2, train_plain, tmp_path / "x", True)[0]
    for world_size in (1, 3):
        for others, other_loss, other_rates in run_on_ranks(world_size, train_plain, tmp_path / "x", False):
            assert other_rates == rates
            assert other_loss == pytest.approx(loss, rel=1e-5)
            for name, value in others.items():
                torch.testing.assert_close(value, values[name], rtol=1e-5, atol=1e-6)


# The latest of several.


def train_and_keep(root: Path, stop: int) -> tuple[list[str], Any]:
    """Resume from the latest checkpoint, if there is one, and save after each step, in the background every other time."""
    run = Run("remainder")
    latest = [zeroopt.checkpoint.latest(root) if root.exists() else None]
    dist.broadcast_object_list(latest)
    if latest[0] is not None:
        run.load(latest[0])
        assert latest[0].name == f"step-{run.step}"
    seen = []
    pending = None
    while run.step < stop:
        seen += run.train(run.step + 1)
        path = root / f"step-{run.step}"
        if run.step % 2:
            run.save(path, keep=2)
        else:
            pending = zeroopt.checkpoint.async_save(
                path, run.model, run.optimizer, run.extra, rank_extra={"random": Random()}, keep=2
            )
    if pending is not None:
        pending.result()
    dist.barrier()
    return sorted(entry.name for entry in root.iterdir()), seen


def test_a_loop_that_keeps_the_latest(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    through = run_on_ranks(2, train_and_keep, tmp_path / "through", 7)
    parts: list[list[Any]] = [[], []]
    for stop, kept in ((3, ["step-2", "step-3"]), (4, ["step-3", "step-4"]), (7, ["step-6", "step-7"])):
        for rank, (names, seen) in enumerate(run_on_ranks(2, train_and_keep, tmp_path / "parts", stop)):
            assert names == kept
            parts[rank] += seen
    assert_same(parts, [seen for _, seen in through])
