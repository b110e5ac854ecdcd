"""Adagrad."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..stepping.rules import AdagradRule, FusedRule
from .fused import FusedOptimizer


class FusedAdagrad(FusedOptimizer, torch.optim.Adagrad):
    """`torch.optim.Adagrad` (Duchi et al. 2011) in one fused kernel: its arguments, and those of `FusedOptimizer`."""

    fused_rule: ClassVar[FusedRule] = AdagradRule()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            for param in group["params"]:  # torch has made it in the parameter's dtype, which rounds
                initial = float(group["initial_accumulator_value"])
                self.state[param]["sum"] = torch.full_like(param, initial, dtype=torch.float32).detach()
