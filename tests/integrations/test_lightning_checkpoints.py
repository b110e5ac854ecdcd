"""Checkpoints of Lightning's Trainer: files as DDP's, and directories."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning_runs import (
    CLASSES,
    DDP,
    PL,
    Net,
    Outcome,
    as_by_torchrun,
    assert_alike,
    batches,
    module_of,
    outcome,
    trainer_of,
    zero,
)
from torch import Tensor, nn
from worker_pool import RunOnRanks

from zeroopt import CheckpointError, ZeroOptError

pytest.importorskip("lightning")

ZERO, PARTS = "zero", "parts"
OLD = "old"  # of torch before 1.6


def strategy_of(how: str) -> Any:
    """DDP's name, or a strategy that writes files or directories."""
    return how if how == DDP else zero(2, state_dict_type="sharded" if how == PARTS else "full")


def assert_same_checkpoints(first: Path, second: Path) -> None:
    """What a Trainer's files hold, but for paths and times."""
    one, other = (torch.load(path, weights_only=True) for path in (first, second))
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def keep_best_and_last(folder: Path) -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return ModelCheckpoint(folder, "{step}", "val", save_last=True, save_top_k=2, every_n_train_steps=None)


def fit_and_save(folder: Path, hows: Sequence[str], kind: type = Net, **options: Any) -> list[list[str]]:
    """The names that each run leaves in a folder of its own."""
    with as_by_torchrun():
        for how in hows:
            trainer = trainer_of(PL, strategy_of(how), callbacks=[keep_best_and_last(folder / how)], **options)
            trainer.fit(module_of(PL, kind), batches(), batches())
            if how != PARTS:
                trainer.save_checkpoint(folder / how / "after.ckpt")
    dist.barrier()
    return [sorted(path.name for path in (folder / how).iterdir()) for how in hows]


def test_files_are_those_of_ddp(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    """The best two and the last while it trains, and one after it; all of it whole, in the same files."""
    ddp, stage_2 = run_on_ranks(2, fit_and_save, tmp_path, [DDP, ZERO], max_epochs=4)[0]
    assert ddp == stage_2 and len(ddp) == 4
    for name in ddp:
        assert_same_checkpoints(tmp_path / DDP / name, tmp_path / ZERO / name)


class TwoOptimizers(Net):
    """By hand; each with groups and state of its own."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        loss = self.loss(batch)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        first, *rest = self.parameters()
        groups = [{"params": rest[:2], "lr": 0.01}, {"params": rest[2:], "momentum": 0.9}]
        return torch.optim.AdamW([first], lr=0.01), torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("kind", [Net, TwoOptimizers])
def test_a_directory_becomes_a_file_of_ddp(run_on_ranks: RunOnRanks, tmp_path: Path, kind: type) -> None:
    from zeroopt.integrations.lightning import consolidate

    files, directories = run_on_ranks(2, fit_and_save, tmp_path, [ZERO, PARTS], kind)[0]
    assert {*files} - {*directories} == {"after.ckpt"}
    consolidate(tmp_path / PARTS / "last.ckpt", tmp_path / "whole.ckpt")
    assert_same_checkpoints(tmp_path / "whole.ckpt", tmp_path / ZERO / "last.ckpt")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        consolidate(tmp_path, tmp_path / "other.ckpt")
    assert not (tmp_path / "other.ckpt").exists()


def resume(how: str, path: Path, kind: type = Net) -> Outcome:
    """Up to the fourth epoch, with a validation of the loaded weights before and a prediction after."""
    with as_by_torchrun():
        module, trainer = module_of(PL, kind), trainer_of(PL, strategy_of(how), max_epochs=4)
        before = trainer.validate(module_of(PL), batches(), ckpt_path=path, verbose=False, weights_only=True)
        trainer.fit(module, batches(), batches(), ckpt_path=path, weights_only=True)
        predicted = torch.cat(trainer.predict(module, batches(), return_predictions=True))
        trainer.callback_metrics.update(predicted=predicted.sum(), before=torch.tensor(before[0]["val"]))
        return outcome(trainer, module)


class Unmade(Net):
    """A layer has no values before the first fit."""

    is_configured = False

    def configure_model(self) -> None:
        if not self.is_configured:
            self.is_configured = True
            with torch.device("meta"):
                self.head = nn.Linear(10, CLASSES)


def test_resuming_on_two_ranks(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    """From what each has saved: all as DDP from its own."""
    run_on_ranks(2, fit_and_save, tmp_path, [DDP, ZERO, PARTS])
    (tmp_path / OLD).mkdir()
    saved = torch.load(tmp_path / ZERO / "last.ckpt", weights_only=True)
    torch.save(saved, tmp_path / OLD / "last.ckpt", _use_new_zipfile_serialization=False)
    runs = [(DDP, DDP), (ZERO, DDP), (DDP, ZERO), (ZERO, ZERO), (ZERO, OLD), (ZERO, PARTS), (PARTS, PARTS)]
    outcomes = [run_on_ranks(2, resume, how, tmp_path / saved / "last.ckpt") for how, saved in runs]
    outcomes += [run_on_ranks(2, resume, ZERO, tmp_path / saved / "last.ckpt", Unmade) for saved in (DDP, PARTS)]
    for rank in zip(*outcomes, strict=True):
        assert_alike(rank, 12)


@pytest.mark.parametrize(("ranks", "tolerance"), [(1, 0.0), (3, 1e-3)])
def test_resuming_on_other_numbers_of_ranks(
    run_on_ranks: RunOnRanks, tmp_path: Path, ranks: int, tolerance: float
) -> None:
    """DDP sums the gradients of three in another order, and Adam makes more of it."""
    run_on_ranks(2, fit_and_save, tmp_path, [ZERO, PARTS])
    runs = [(DDP, ZERO), (ZERO, ZERO), (ZERO, PARTS)]
    outcomes = [run_on_ranks(ranks, resume, how, tmp_path / saved / "last.ckpt") for how, saved in runs]
    for rank in zip(*outcomes, strict=True):
        assert_alike(rank, 2 * 12 // ranks, tolerance)


class Changing(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"].pop("unused.bias")


def save_what_has_no_parts(folder: Path) -> list[str]:
    """What is refused: hooks that change the weights, options of a file system, and state behind `fit`."""
    messages = []
    with as_by_torchrun():
        for kind, options in ((Changing, {}), (Net, {"storage_options": {}}), (Net, {})):
            module, trainer = module_of(PL, kind), trainer_of(PL, strategy_of(PARTS), max_epochs=1)
            save = partial(trainer.save_checkpoint, folder / "refused.ckpt", **options)
            if kind is Changing or options:
                module.on_train_end = save
            with pytest.raises(ZeroOptError) as raised:
                trainer.fit(module, batches())
                save()
            messages.append(f"{type(raised.value).__name__}: {raised.value}")
    return messages


def test_what_cannot_be_saved_in_parts(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for messages in run_on_ranks(2, save_what_has_no_parts, tmp_path):
        assert [message.partition(":")[0] for message in messages] == [
            "NotSupportedError",
            "NotSupportedError",
            "StateError",
        ]
        for message, words in zip(
            messages, ("a hook (on_save_checkpoint)", "storage_options", "on_train_end"), strict=True
        ):
            assert words in message
    assert not (tmp_path / "refused.ckpt").exists()


class Noting(Net):
    """Makes something to be saved, each time anew."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(3)

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen += 1

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen.clone()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def save_what_is_made(folder: Path) -> list[float]:
    seen = []
    with as_by_torchrun():
        for epochs, path in ((1, None), (2, folder / "last.ckpt")):
            options = {"callbacks": [keep_best_and_last(folder)]} if path is None else {}
            trainer = trainer_of(PL, strategy_of(PARTS), max_epochs=epochs, **options)
            module = module_of(PL, Noting)
            trainer.fit(module, batches(), batches(), ckpt_path=path, weights_only=True)
            seen.append(float(module.seen[0]))
    return seen


def test_what_modules_make_is_saved_in_parts(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for first, second in run_on_ranks(2, save_what_is_made, tmp_path):
        assert second == 2 * first > 0


class Layers(Net):
    """Without what 16-bit parameters cannot feed on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.body[1] = nn.LayerNorm(10)


def train_on(folder: Path, state_dict_type: str) -> list[Outcome]:
    """Parameters in bfloat16: in one go, and in two, by way of a checkpoint."""
    options = {"param_dtype": torch.bfloat16, "state_dict_type": state_dict_type}
    outcomes = []
    with as_by_torchrun():
        for epochs, path in ((4, None), (2, None), (4, folder / "last.ckpt")):
            kept = keep_best_and_last(folder) if epochs == 2 else None
            trainer = trainer_of(
                PL,
                zero(2, **options),
                precision="bf16-mixed",
                max_epochs=epochs,
                **({"callbacks": [kept]} if kept else {}),
            )
            module = module_of(PL, Layers)
            trainer.fit(module, batches(), batches(), ckpt_path=path, weights_only=True)
            outcomes.append(outcome(trainer, module))
    whole, *parts = outcomes
    return [whole, parts[1]._replace(losses=parts[0].losses + parts[1].losses)]


@pytest.mark.parametrize("state_dict_type", ["full", "sharded"])
def test_masters_go_along(run_on_ranks: RunOnRanks, tmp_path: Path, state_dict_type: str) -> None:
    for one in run_on_ranks(2, train_on, tmp_path, state_dict_type):
        assert_alike(one, 24)
