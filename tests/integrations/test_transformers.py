"""transformers' Trainer with zeroopt against the same Trainer with DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from worker_pool import RunOnRanks

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerators import as_started
from trainers import (
    GLOBAL_BATCH,
    Log,
    Sequences,
    assert_same_log,
    llama,
    log_of,
    make,
    values,
)

import zeroopt

NORM_ORDER = 2e-6  # what the order in which squares are summed may change of a norm, and of what is clipped by it
ROUNDING = 2e-5  # the same of gradients that are summed over other numbers of ranks, in a few steps
UNFUSED = {"fused": False}

UNCLIPPED: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "warmup_steps": 2},
    "activation checkpointing": {"activation_checkpointing": True},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "bf16": {"bf16": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
}


def without_norms(log: Log) -> Log:
    return [{name: value for name, value in entry.items() if name != "grad_norm"} for entry in log]


def norms(log: Log) -> Log:
    return [{"grad_norm": entry["grad_norm"]} for entry in log if "grad_norm" in entry]


def compare(folder: Path, given: dict[str, Any], tolerance: float) -> None:
    """Logs and parameters in all stages; norms are sums in another order."""
    with as_started():
        reference = make(folder, None, **given)
        reference.train()
        expected = log_of(reference)
        for stage in (0, 1, 2):
            trainer = make(folder, {"stage": stage, **UNFUSED}, **given)
            trainer.train()
            assert isinstance(trainer.model_wrapped, zeroopt.ZeroDataParallel)
            assert_same_log(without_norms(log_of(trainer)), without_norms(expected), tolerance)
            assert_same_log(norms(log_of(trainer)), norms(expected), NORM_ORDER)
            torch.testing.assert_close(values(trainer.model), values(reference.model), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", UNCLIPPED)
def test_same_as_with_ddp(run_on_ranks: RunOnRanks, tmp_path: Path, name: str) -> None:
    run_on_ranks(2, compare, tmp_path, {"max_grad_norm": 0.0, **UNCLIPPED[name]}, 0.0, timeout=200)


def test_same_as_with_ddp_when_clipping(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, compare, tmp_path, {"max_grad_norm": 0.1}, ROUNDING)


def train_in_16_bits(folder: Path) -> None:
    """Parameters in bfloat16 with float32 masters follow float32 ones under autocast."""
    with as_started():
        reference = make(folder, None, bf16=True, max_steps=8)
        reference.train()
        trainer = make(
            folder, {"param_dtype": torch.bfloat16}, bf16=True, max_steps=8, save_strategy="steps", save_steps=8
        )
        trainer.train()
        assert {param.dtype for param in trainer.model.parameters()} == {torch.bfloat16}
        assert_same_log(norms(log_of(trainer)), norms(log_of(reference)), 0.03)
        assert_same_log(without_norms(log_of(trainer)), without_norms(log_of(reference)), 0.003)


def test_param_dtype(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, train_in_16_bits, tmp_path)


# Saving and resuming.

SAVING = {"save_strategy": "steps", "save_steps": 2}
TIERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 and 8 bits": {"param_dtype": torch.bfloat16, "master_weights": "remainder", "state_dtype": torch.int8},
    "whole state": {"whole_state": True},
}


def train_and_save(folder: Path, zero: dict[str, Any] | None, given: dict[str, Any]) -> tuple[Log, dict[str, Tensor]]:
    with as_started():
        trainer = make(folder, zero, **SAVING, **given)
        trainer.train()
        return log_of(trainer), values(trainer.model)


def resume(folder: Path, zero: dict[str, Any] | None, given: dict[str, Any]) -> tuple[Log, dict[str, Tensor]]:
    """From the checkpoint after two steps, with a model of other weights."""
    with as_started():
        trainer = make(folder, zero, llama(seed=1), **given)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        return log_of(trainer), values(trainer.model)


@pytest.mark.parametrize("tier", TIERS)
def test_resuming(run_on_ranks: RunOnRanks, tmp_path: Path, tier: str) -> None:
    zero = TIERS[tier]
    expected, its_values = run_on_ranks(2, train_and_save, tmp_path, zero, {})[0]
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert ("optimizer.pt" in names, "zeroopt" in names) == (tier == "whole state", tier != "whole state")
    for log, here in run_on_ranks(2, resume, tmp_path, zero, {}):
        assert_same_log(
            log[:-1], expected[:-1]
        )  # the last entry is the mean loss of those steps that this train() took
        torch.testing.assert_close(here, its_values, rtol=0, atol=0)
    for ranks in (1, 3):
        log, here = run_on_ranks(ranks, resume, tmp_path, zero, {})[0]
        assert_same_log(
            without_norms(log[:-1]), without_norms(expected[:-1]), ROUNDING if tier != "bfloat16 and 8 bits" else 0.01
        )


def test_resuming_from_ddp_and_with_it(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    given = {"max_grad_norm": 0.0}
    expected, its_values = run_on_ranks(2, train_and_save, tmp_path / "ddp", None, given)[0]
    for zero in (UNFUSED, {**UNFUSED, "stage": 1, "whole_state": True}):
        log, here = run_on_ranks(2, resume, tmp_path / "ddp", zero, given)[0]
        assert_same_log(without_norms(log[:-1]), without_norms(expected[:-1]))
        torch.testing.assert_close(here, its_values, rtol=0, atol=0)
    run_on_ranks(2, train_and_save, tmp_path / "zeroopt", {**UNFUSED, "whole_state": True}, given)
    log, here = run_on_ranks(2, resume, tmp_path / "zeroopt", None, given)[0]
    assert_same_log(without_norms(log[:-1]), without_norms(expected[:-1]))
    torch.testing.assert_close(here, its_values, rtol=0, atol=0)


def keep_the_best(
    folder: Path, zero: dict[str, Any] | None, given: dict[str, Any]
) -> tuple[set[str], dict[str, Tensor]]:
    """A learning rate that is too high makes an early model the best."""
    with as_started():
        trainer = make(
            folder,
            zero,
            learning_rate=0.3,
            max_grad_norm=0.0,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            **given,
        )
        trainer.train()
        assert trainer.state.best_global_step is not None
        dist.barrier()
        return {path.name for path in folder.iterdir()}, values(trainer.model)


@pytest.mark.parametrize("options", [{}, {"share_parameters": True}, {"param_dtype": torch.bfloat16}], ids=str)
def test_best_model_and_rotation(run_on_ranks: RunOnRanks, tmp_path: Path, options: dict[str, Any]) -> None:
    given = {"save_only_model": not options}
    names, best = run_on_ranks(2, keep_the_best, tmp_path / "ddp", None, given)[0]
    for its_names, here in run_on_ranks(2, keep_the_best, tmp_path / "zeroopt", {**UNFUSED, **options}, given):
        assert its_names == names
        if "param_dtype" not in options:
            torch.testing.assert_close(here, best, rtol=0, atol=0)
    newest = tmp_path / "zeroopt" / max(names)
    assert (newest / "zeroopt").exists() == bool(options)


# Evaluation, and training more than once.


def evaluate_around(folder: Path, zero: dict[str, Any] | None) -> tuple[list[dict[str, float]], Tensor, Log]:
    """Metrics before and after training, predictions, and the log of a second training."""
    with as_started():
        trainer = make(folder, zero, max_grad_norm=0.0)
        metrics = [trainer.evaluate()]
        trainer.train()
        metrics.append(trainer.evaluate())
        predicted = torch.as_tensor(trainer.predict(Sequences(GLOBAL_BATCH)).predictions)
        trainer.train()
        metrics.append(trainer.evaluate())
        return [{"eval_loss": one["eval_loss"]} for one in metrics], predicted, without_norms(log_of(trainer))


def test_evaluation_before_training_and_a_second_training(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    """With DDP, Trainer trains the bare model after an evaluation, each rank for itself."""
    first, second = run_on_ranks(2, evaluate_around, tmp_path, UNFUSED)
    assert first[0] == second[0] and first[2] == second[2]
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=0)
    expected, _ = run_on_ranks(2, train_twice, tmp_path)[0]
    assert_same_log(first[2], expected)


def train_twice(folder: Path) -> tuple[Log, None]:
    with as_started():
        trainer = make(folder, None, max_grad_norm=0.0)
        trainer.train()
        trainer.evaluate()
        trainer.predict(Sequences(GLOBAL_BATCH))
        trainer.train()
        trainer.evaluate()
        return without_norms(log_of(trainer)), None
