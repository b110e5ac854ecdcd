"""RMSprop."""

from __future__ import annotations

from typing import ClassVar

import torch

from .. import ops
from ..stepping.rules import FusedRule
from .fused import FusedOptimizer


class FusedRMSprop(FusedOptimizer, torch.optim.RMSprop):
    """`torch.optim.RMSprop` (Tieleman & Hinton 2012) in one fused kernel: its arguments, and those of `FusedOptimizer`.

    With ``centered=True`` the step is divided by a small difference of two averages. Rounded to 16 or 8 bits they may leave
    nothing of it: keep such state in float32, or `eps` large.
    """

    fused_rule: ClassVar[FusedRule] = FusedRule(ops.OPTIMIZERS["rmsprop"])
