"""Lightning's Trainer: it trains as under its own DDP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning_runs import (
    DDP,
    PL,
    Net,
    Outcome,
    as_by_torchrun,
    assert_alike,
    batches,
    fit,
    module_of,
    outcome,
    trainer_of,
    zero,
)
from pages import snippets
from paths import ROOT
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from worker_pool import RunOnRanks

import zeroopt
from zeroopt import ConfigError, NotSupportedError

pytest.importorskip("lightning")


def fit_each(stages: Sequence[int] = (0, 1, 2), kind: type = Net, **options: Any) -> list[Outcome]:
    """Under DDP, then in each stage."""
    with as_by_torchrun():
        return [fit(strategy, kind, **options) for strategy in (DDP, *map(zero, stages))]


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


def fit_twin() -> list[Outcome]:
    from zeroopt.integrations import pytorch_lightning

    own = pytorch_lightning.ZeroStrategy(2, fused=False)
    with as_by_torchrun():
        fit("zeroopt_stage_1", package="pytorch_lightning")
        return [fit(strategy, package="pytorch_lightning") for strategy in (DDP, own)]


def test_the_other_package(run_on_ranks: RunOnRanks) -> None:
    pytest.importorskip("pytorch_lightning")
    for one in run_on_ranks(2, fit_twin):
        assert_alike(one, 12)


class Layers(Net):
    """Without what 16-bit parameters cannot feed on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.body[1] = nn.LayerNorm(10)


class Unmade(Layers):
    """Its parts are built by ranks, on the meta device."""

    def configure_model(self) -> None:
        torch.manual_seed(9)
        with torch.device("meta"):
            self.body, self.head = nn.Linear(6, 10), nn.Linear(10, 4)


class Made(Layers):
    def configure_model(self) -> None:
        torch.manual_seed(9)
        self.body, self.head = nn.Linear(6, 10), nn.Linear(10, 4)


def fit_with_options() -> tuple[list[Outcome], Outcome, Outcome]:
    """What gives DDP's results with options of zeroopt; under autocast, and so with parameters in bfloat16 that have masters."""
    with as_by_torchrun():
        exact = [fit(DDP, Made), fit(zero(2), Made), fit(zero(2), Unmade)]
        exact += [fit(zero(2, **{option: True}), Made) for option in ("share_parameters", "step_in_backward")]
        mixed = fit(zero(2), Layers, precision="bf16-mixed")
        module = module_of(PL, Layers)
        trainer = trainer_of(PL, zero(2, param_dtype=torch.bfloat16), precision="bf16-mixed")
        module.on_train_end = lambda: dtypes.append(module.head.weight.dtype)
        dtypes: list[torch.dtype] = []
        trainer.fit(module, batches(), batches())
        assert dtypes == [torch.bfloat16]
        return exact, mixed, outcome(trainer, module)


def test_options_of_wrap(run_on_ranks: RunOnRanks) -> None:
    for exact, mixed, rounded in run_on_ranks(2, fit_with_options):
        assert_alike(exact, 12)
        torch.testing.assert_close(rounded.losses, mixed.losses, rtol=0.02, atol=0)
        assert all(value.dtype is torch.float32 for value in rounded.values.values()), "the masters, behind fit"


def average(strategy: Any, callback: str, **options: Any) -> Outcome:
    from lightning.pytorch import callbacks

    return fit(
        strategy, Layers, callbacks=[getattr(callbacks, callback)(**options)], enable_checkpointing=False, max_epochs=4
    )


def fit_averages(callback: str, options: dict[str, Any]) -> list[Outcome]:
    with as_by_torchrun():
        return [average(strategy, callback, **options) for strategy in (DDP, zero(2))]


@pytest.mark.parametrize(
    ("callback", "options"),
    [
        ("StochasticWeightAveraging", {"swa_lrs": 0.01, "swa_epoch_start": 2, "annealing_epochs": 1}),
        ("EMAWeightAveraging", {"decay": 0.8}),
    ],
)
def test_averages_of_weights(run_on_ranks: RunOnRanks, callback: str, options: dict[str, Any]) -> None:
    for one in run_on_ranks(2, fit_averages, callback, options):
        assert_alike(one, 24)


def watch(folder: Path) -> list[Any]:
    """Names and values that LearningRateMonitor finds, those of a learning-rate finder, and a fit after it."""
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.tuner import Tuner

    seen = []
    with as_by_torchrun():
        for strategy in (DDP, zero(2)):
            monitor = LearningRateMonitor()
            fit(
                strategy, callbacks=[monitor], enable_checkpointing=False, logger=CSVLogger(folder), log_every_n_steps=1
            )
            seen.append(monitor.lrs)
        for strategy in (DDP, zero(2)):
            module, trainer = module_of(PL), trainer_of(PL, strategy, default_root_dir=folder)
            module.lr = 0.1
            module.configure_optimizers = partial(_with_rate, module)
            found = Tuner(trainer).lr_find(
                module, batches(), num_training=8, early_stop_threshold=None, update_attr=False
            )
            trainer.fit(module, batches(), batches())
            seen.append((found.results["loss"], outcome(trainer, module)._asdict()))
    return seen


def _with_rate(module: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=module.lr)


def test_learning_rates_are_found_and_watched(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    for ddp_rates, rates, ddp_found, found in run_on_ranks(2, watch, tmp_path):
        assert rates == ddp_rates == {"lr-AdamW": [0.02, 0.01]}
        torch.testing.assert_close(found, ddp_found, rtol=0, atol=0)


def fit_again() -> list[Outcome]:
    """One module by DDP and by zeroopt in turns, with one Trainer and another, and evaluated in between."""
    outcomes = []
    with as_by_torchrun():
        for strategies in ((DDP, DDP), (zero(1), zero(2)), (zero(2), DDP), (DDP, zero(0))):
            module, first, second = module_of(PL), *(trainer_of(PL, one) for one in strategies)
            first.fit(module, batches(), batches())
            first.fit_loop.max_epochs = 3
            first.fit(module, batches(), batches())
            first.test(module, batches(), verbose=False)
            assert type(first.optimizers[0]) is torch.optim.AdamW and first.model is module
            second.fit(module, batches(), batches())
            second.callback_metrics.update(first.callback_metrics)
            outcomes.append(outcome(second, module))
    return outcomes


def test_a_module_is_fitted_again(run_on_ranks: RunOnRanks) -> None:
    for one in run_on_ranks(2, fit_again):
        assert_alike(one, 30)


def fit_compiled() -> list[Outcome]:
    with as_by_torchrun():
        eager = fit(DDP, limit_train_batches=3, max_epochs=1)
        module, trainer = module_of(PL), trainer_of(PL, zero(2), limit_train_batches=3, max_epochs=1)
        trainer.fit(torch.compile(module, backend="eager"), batches(), batches())
        return [eager, outcome(trainer, module)]


def test_a_compiled_module(run_on_ranks: RunOnRanks) -> None:
    for one in run_on_ranks(2, fit_compiled):
        assert_alike(one, 3)


class ReturnsNone(Net):
    def configure_optimizers(self) -> None:
        return None


class ByHand(ReturnsNone):
    automatic_optimization = False


class SecondIsRefused(Net):
    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.body.parameters(), lr=0.1), torch.optim.LBFGS(self.head.parameters())


class Raises(Net):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if index == 2 and torch.distributed.get_rank() == 1:
            raise ValueError("no such batch")
        return super().training_step(batch, index)


def fail() -> list[str]:
    from zeroopt.integrations.lightning import ZeroStrategy

    attempts: list[Callable[[], Any]] = [
        lambda: ZeroStrategy(stage=3),
        lambda: ZeroStrategy(static_graph=True),
        lambda: ZeroStrategy(bucket=1),
        lambda: ZeroStrategy(state_dict_type="whole"),
        lambda: fit(ZeroStrategy(param_dtype=torch.bfloat16), precision="bf16-true"),
        lambda: fit(zero(2), ByHand),
        lambda: fit(zero(2, bucket_mb=-1.0), Unmade),
    ]
    messages = []
    with as_by_torchrun():
        assert len(fit(zero(2), ReturnsNone).losses) == 12
        for attempt in attempts:
            with pytest.raises(ConfigError) as raised:
                attempt()
            messages.append(str(raised.value))
        module = module_of(PL, SecondIsRefused)
        with pytest.raises(NotSupportedError) as refused:
            trainer_of(PL, zero(2)).fit(module, batches())
        messages.append(str(refused.value))
        zeroopt.wrap(module, torch.optim.SGD(module.parameters()))  # nothing of it is wrapped
    return messages


def test_errors(run_on_ranks: RunOnRanks) -> None:
    words = [
        "stage",
        "static_graph",
        "'bucket'",
        "state_dict_type",
        "bf16-mixed",
        "configure_optimizers",
        "bucket_mb",
        "LBFGS",
    ]
    for messages in run_on_ranks(2, fail):
        for message, word in zip(messages, words, strict=True):
            assert word in message


def fit_until_it_raises() -> None:
    with as_by_torchrun():
        fit(zero(2), Raises)


def test_the_error_of_one_rank_is_told(run_on_ranks: RunOnRanks) -> None:
    """It leaves without waiting for the others in its teardown; the others notice that it has."""
    error = run_on_ranks.outcomes(2, fit_until_it_raises)[1]
    assert (error.type_name, error.message) == ("ValueError", "no such batch")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_without_the_package(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import zeroopt.integrations.{package}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith(
        f"ImportError: zeroopt.integrations.{package} needs {package} (tried with 2.6.6): pip install"
    )


def run_page(folder: Path) -> None:
    net = nn.Linear(6, 4)
    names: dict[str, Any] = {
        "torch": torch,
        "folder": folder,
        "module": module_of(PL),
        "loader": batches(),
        "model": net,
        "optimizer": torch.optim.AdamW(net.parameters()),
        "batches": DataLoader(TensorDataset(torch.randn(8, 6)), 2),
    }
    with as_by_torchrun(), patch("os.getcwd", lambda: str(folder)):  # in which a Trainer writes its logs
        for snippet in snippets(ROOT / "docs" / "frameworks" / "lightning.md"):
            exec(snippet, names)  # noqa: S102
    assert (folder / "fabric.ckpt").exists() and Path(names["path"]).is_dir()


def test_the_page_runs(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, run_page, tmp_path)
