"""Adagrad."""

from __future__ import annotations

import torch

from ..fused_rules import AdagradRule
from .fused import FusedOptimizer


class FusedAdagrad(FusedOptimizer, torch.optim.Adagrad):
    """`torch.optim.Adagrad` (Duchi et al. 2011) in one fused kernel: its arguments, and those of `FusedOptimizer`."""

    fused_rule = AdagradRule()
