"""AdamW and Adam."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..stepping.rules import AdamWRule, FusedRule
from .fused import FusedOptimizer


class FusedAdamW(FusedOptimizer, torch.optim.AdamW):
    """`torch.optim.AdamW` (Loshchilov & Hutter 2019) in one fused kernel: its arguments, and those of `FusedOptimizer`."""

    fused_rule: ClassVar[FusedRule] = AdamWRule(decoupled=True)


class FusedAdam(FusedOptimizer, torch.optim.Adam):
    """`torch.optim.Adam` (Kingma & Ba 2015) in one fused kernel: its arguments, and those of `FusedOptimizer`."""

    fused_rule: ClassVar[FusedRule] = AdamWRule(decoupled=False)
