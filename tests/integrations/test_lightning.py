"""Lightning's Trainer and Fabric: as under their own DDP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_runs import Net, Outcome, as_by_torchrun, batches, module_of, outcome, trainer_of
from torch import Tensor, nn
from worker_pool import RunOnRanks

pytest.importorskip("lightning")

PL = "lightning.pytorch"


def zero(stage: int, **options: Any) -> Any:
    from zeroopt.integrations.lightning import ZeroStrategy

    return ZeroStrategy(stage, fused=False, **options)


def fit(strategy: Any, kind: type = Net, package: str = PL, **options: Any) -> Outcome:
    module, trainer = module_of(package, kind), trainer_of(package, strategy, **options)
    trainer.fit(module, batches(), batches())
    return outcome(trainer, module)


def fit_each(stages: Sequence[int] = (0, 1, 2), kind: type = Net, **options: Any) -> list[Outcome]:
    """Under DDP, then in each stage."""
    with as_by_torchrun():
        return [fit(strategy, kind, **options) for strategy in ("ddp_find_unused_parameters_true", *map(zero, stages))]


def assert_alike(outcomes: Sequence[Outcome], steps: int, tolerance: float = 0.0) -> None:
    """Bit for bit, unless gradients are clipped by a norm, whose squares are added up in another order, or averaged twice by DDP."""
    ddp, *stages = outcomes
    assert len(ddp.losses) == steps and len({*ddp.losses}) == steps
    for one in stages:
        torch.testing.assert_close(one._asdict(), ddp._asdict(), rtol=tolerance, atol=tolerance)


def test_automatic_optimization(run_on_ranks: RunOnRanks) -> None:
    """With accumulation, clipping by value, a validation each epoch and a scheduler by epochs."""
    clipping = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    outcomes = run_on_ranks(2, fit_each, accumulate_grad_batches=2, **clipping)
    for one in outcomes:
        assert_alike(one, 12)
    assert outcomes[0][0].metrics["val"] > 0 and outcomes[0][0].rates == [0.005]


class Adversaries(Net):
    """Two optimizers by hand, of which each freezes the other's parameters, with clipping, accumulation and a scheduler."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.body[1] = nn.LayerNorm(10)  # Lightning's DDP leaves buffers to each rank here

    def training_step(self, batch: list[Tensor], index: int) -> None:
        steps = index % 2 == 1
        for optimizer, sign in zip(self.optimizers(), (1, -0.1), strict=True):
            with optimizer.toggle_model(sync_grad=steps):
                loss = sign * self.loss(batch)
                self.manual_backward(loss)
                if steps:
                    self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")
                    optimizer.step()
                    optimizer.zero_grad()
            self.losses.append(loss.item())
        if index % 4 == 3:
            self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        body = torch.optim.AdamW(self.body.parameters(), lr=0.02)
        head = torch.optim.SGD([*self.head.parameters(), *self.unused.parameters()], lr=0.1, momentum=0.9)
        return [body, head], [torch.optim.lr_scheduler.ExponentialLR(head, 0.9)]


def test_manual_optimization_with_two_optimizers(run_on_ranks: RunOnRanks) -> None:
    for one in run_on_ranks(2, fit_each, kind=Adversaries):
        assert_alike(one, 24, tolerance=1e-6)


class Plateau(Net):
    """The learning rate follows the validation loss."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
                "monitor": "val",
            },
        }


def test_clipping_by_norm_and_a_plateau(run_on_ranks: RunOnRanks) -> None:
    outcomes = run_on_ranks(2, fit_each, (1, 2), Plateau, gradient_clip_val=0.2, max_epochs=3)
    for one in outcomes:
        assert_alike(one, 18, tolerance=1e-6)
    assert outcomes[0][0].rates < [0.5]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_precision(run_on_ranks: RunOnRanks, precision: str) -> None:
    for one in run_on_ranks(2, fit_each, (0, 2), precision=precision):
        assert_alike(one, 12)


def checkpoint_of(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_checkpoints(one: dict[str, Any], other: dict[str, Any]) -> None:
    """What a Trainer's files hold, but for paths and times."""
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def keep_best_and_last(folder: Path) -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return ModelCheckpoint(folder, "{step}", "val", save_last=True, save_top_k=2, every_n_train_steps=None)


def fit_and_save(strategies: Sequence[tuple[str, Any]], folder: Path, **options: Any) -> list[list[str]]:
    """The files of each run, by name."""
    with as_by_torchrun():
        for name, make in strategies:
            kept = keep_best_and_last(folder / name)
            trainer = trainer_of(PL, make() if callable(make) else make, callbacks=[kept], **options)
            trainer.fit(module_of(PL), batches(), batches())
            trainer.save_checkpoint(folder / name / "after.ckpt")
    return [sorted(path.name for path in (folder / name).iterdir()) for name, _ in strategies]


DDP = "ddp_find_unused_parameters_true"


def test_checkpoints_are_those_of_ddp(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    """The best two and the last while it trains, and one after it; all of it whole, in the same files."""
    ddp, stage_2 = run_on_ranks(2, fit_and_save, [("ddp", DDP), ("zero", zero_2)], tmp_path, max_epochs=4)[0]
    assert ddp == stage_2 and len(ddp) == 4
    for name in ddp:
        assert_same_checkpoints(checkpoint_of(tmp_path / "ddp" / name), checkpoint_of(tmp_path / "zero" / name))


def zero_2() -> Any:
    return zero(2)


def resume(strategy: Any, path: Path, **options: Any) -> Outcome:
    """Up to the fourth epoch, from a file, with a validation of the loaded weights before and a prediction after."""
    with as_by_torchrun():
        module, trainer = module_of(PL), trainer_of(PL, strategy() if callable(strategy) else strategy, max_epochs=4)
        before = trainer.validate(module, batches(), ckpt_path=path, verbose=False, weights_only=True)
        trainer.fit(module, batches(), batches(), ckpt_path=path, weights_only=True)
        predicted = torch.cat(trainer.predict(module, batches(), return_predictions=True))
        trainer.callback_metrics.update(predicted=predicted.sum(), before=torch.tensor(before[0]["val"]))
        return outcome(trainer, module)


def test_resuming_on_two_ranks(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    """By zeroopt from DDP's file and from its own, and by DDP from zeroopt's: all as DDP from its own."""
    run_on_ranks(2, fit_and_save, [("ddp", DDP), ("zero", zero_2)], tmp_path)
    runs = [(DDP, "ddp"), (zero_2, "ddp"), (DDP, "zero"), (zero_2, "zero")]
    for rank in zip(
        *(run_on_ranks(2, resume, how, tmp_path / source / "last.ckpt") for how, source in runs), strict=True
    ):
        assert_alike(rank, 12)


@pytest.mark.parametrize(("ranks", "tolerance"), [(1, 0.0), (3, 1e-3)])
def test_resuming_on_other_numbers_of_ranks(
    run_on_ranks: RunOnRanks, tmp_path: Path, ranks: int, tolerance: float
) -> None:
    """DDP sums the gradients of three in another order, and Adam makes more of it."""
    run_on_ranks(2, fit_and_save, [("zero", zero_2)], tmp_path)
    path = tmp_path / "zero" / "last.ckpt"
    for rank in zip(*(run_on_ranks(ranks, resume, how, path) for how in (DDP, zero_2)), strict=True):
        assert_alike(rank, 2 * 12 // ranks, tolerance)
