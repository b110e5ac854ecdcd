"""SGD."""

from __future__ import annotations

from typing import ClassVar

import torch

from .. import ops
from ..stepping.rules import FusedRule
from .fused import FusedOptimizer


class FusedSGD(FusedOptimizer, torch.optim.SGD):
    """`torch.optim.SGD` in one fused kernel: its arguments, and those of `FusedOptimizer`."""

    fused_rule: ClassVar[FusedRule] = FusedRule(ops.sgd, has_step=False)
