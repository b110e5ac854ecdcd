"""What people write with zeroopt within a framework."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]  it has none
from lightning.fabric import Fabric
from lightning.pytorch import Trainer as LightningTrainer
from torch import nn
from transformers import Trainer

from zeroopt.integrations import accelerate as of_accelerate
from zeroopt.integrations import transformers as of_transformers
from zeroopt.integrations.lightning import ZeroFabricStrategy, ZeroStrategy, consolidate, unwrap
from zeroopt.integrations.transformers import ZeroTrainerMixin


class OwnTrainer(ZeroTrainerMixin, Trainer):
    zeroopt_options: Mapping[str, Any] = MappingProxyType({"stage": 1})


def with_accelerate() -> Accelerator:
    return of_accelerate.enable(Accelerator(), stage=2, max_grad_norm=1.0)


def with_transformers(trainer: Trainer) -> Trainer:
    return of_transformers.enable(trainer, stage=2, whole_state=True)


def with_lightning(model: nn.Module) -> tuple[LightningTrainer, Fabric, nn.Module]:
    trainer = LightningTrainer(strategy=ZeroStrategy(stage=2))
    fabric = Fabric(strategy=ZeroFabricStrategy(stage=1))
    consolidate("runs/last.ckpt", "runs/whole.ckpt")
    return trainer, fabric, unwrap(model)
