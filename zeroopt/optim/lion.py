"""Lion, which torch does not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from .. import ops
from ..errors import ConfigError
from ..stepping.rules import FusedRule
from .fused import FusedOptimizer


class FusedLion(FusedOptimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2) in one fused kernel.

    Its step has the size of the learning rate in every element: the paper advises a third to a tenth of AdamW's learning
    rate, and a weight decay as many times larger.

    Args:
        params: parameters, or param_groups.
        lr: learning rate, not negative.
        betas: of the direction of the step, and of the average that the next step starts from; each in [0, 1).
        weight_decay: decoupled, not negative.
        maximize: ascend.
        options: those of `FusedOptimizer`.

    Raises:
        ConfigError: a value out of range.
    """

    fused_rule: ClassVar[FusedRule] = FusedRule(ops.lion)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        check_ranges(lr=lr, betas=betas, weight_decay=weight_decay)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)


def check_ranges(*, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 0.0) -> None:
    """Raise ConfigError for hyper-parameters that no optimizer could use."""
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        if not float(value) >= 0.0:
            raise ConfigError(f"expected {name} to be at least 0, got {value}")
    for number, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ConfigError(f"expected betas[{number}] to be at least 0 and below 1, got {beta}")
