"""A small LightningModule, and runs of it by Lightning's Trainer on the ranks of the worker pool."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, FEATURES, CLASSES, BATCH = 48, 6, 4, 4
PL = "lightning.pytorch"
DDP = "ddp_find_unused_parameters_true"
FIT = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "max_epochs": 2}


class Net:
    """Beside `LightningModule`, of either package, among the bases of a class."""

    automatic_optimization: bool
    log: Callable[..., None]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1234)
        hidden = 10
        # Without a bias: before a BatchNorm its gradient is rounding alone, of which Adam makes whole steps.
        self.body = nn.Sequential(nn.Linear(FEATURES, hidden, bias=False), nn.BatchNorm1d(hidden), nn.GELU())
        self.head = nn.Linear(hidden, CLASSES)
        self.unused = nn.Linear(3, 2)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("test", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def module_of(package: str, kind: type = Net) -> Any:
    """A module of a package, "lightning.pytorch" or "pytorch_lightning"."""
    return type(kind.__name__, (kind, import_module(package).LightningModule), {})()


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randint(CLASSES, (SAMPLES,), generator=generator)), BATCH)


@contextmanager
def as_by_torchrun() -> Iterator[None]:
    """The worker's environment is that of a process that torchrun has started. Its process group is there already."""
    size = str(dist.get_world_size())
    torchrun = {"TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": size}
    with patch.dict(os.environ, torchrun), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


def trainer_of(package: str, strategy: Any, **options: Any) -> Any:
    """A Trainer on all ranks. Within `as_by_torchrun`."""
    defaults = {**FIT, "enable_checkpointing": "callbacks" in options}
    return import_module(package).Trainer(
        accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, **{**defaults, **options}
    )


class Outcome(NamedTuple):
    """Of a run, on one rank."""

    losses: list[float]
    values: dict[str, Tensor]
    metrics: dict[str, float]
    rates: list[float]


def zero(stage: int, **options: Any) -> Any:
    """A strategy for `lightning`'s Trainer that computes as DDP does."""
    from zeroopt.integrations.lightning import ZeroStrategy

    return ZeroStrategy(stage, fused=False, **options)


def outcome(trainer: Any, module: Any) -> Outcome:
    """What has become of a module."""
    values = {name: value.clone() for name, value in module.state_dict().items()}
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return Outcome(module.losses, values, metrics, rates)


def fit(strategy: Any, kind: type = Net, package: str = PL, **options: Any) -> Outcome:
    """Within `as_by_torchrun`."""
    module, trainer = module_of(package, kind), trainer_of(package, strategy, **options)
    trainer.fit(module, batches(), batches())
    return outcome(trainer, module)


def assert_alike(outcomes: Sequence[Outcome], steps: int, tolerance: float = 0.0) -> None:
    """Bit for bit, unless gradients are clipped by a norm, whose squares are added up in another order, or averaged twice by DDP."""
    ddp, *others = outcomes
    assert len(ddp.losses) == steps and len({*ddp.losses}) == steps
    for one in others:
        torch.testing.assert_close(one._asdict(), ddp._asdict(), rtol=tolerance, atol=tolerance)
