"""LAMB, which torch does not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from .. import ops
from ..stepping.rules import FusedRule
from .fused import FusedOptimizer
from .lion import check_ranges


class FusedLAMB(FusedOptimizer):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2) in two fused kernels, for large batches.

    Adam's step with weight decay, its length in every parameter scaled to learning rate times the parameter's norm. (phi is
    the identity, moments are corrected for their start at zero, and a parameter or step of norm 0 is not scaled.)

    Args:
        params: parameters, or param_groups.
        lr: learning rate, not negative.
        betas: of the moments, each in [0, 1).
        eps: added to the root of the second moment, not negative.
        weight_decay: not negative.
        maximize: ascend.
        options: those of `FusedOptimizer`.

    Raises:
        ConfigError: a value out of range.
    """

    fused_rule: ClassVar[FusedRule] = FusedRule(ops.lamb)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        check_ranges(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)
