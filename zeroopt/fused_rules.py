"""Which torch optimizers have a fused kernel, and how their options and state map to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from . import ops

ParamGroup = dict[str, Any]


class FusedRule(ABC):
    """The kernel of one class of torch optimizers.

    Attributes:
        state_names: the tensors of state that a parameter may have, by torch's names.
        has_step: torch keeps a step count in the state.
    """

    state_names: tuple[str, ...]
    has_step: bool

    @abstractmethod
    def hyper_row(self, group: ParamGroup) -> list[float]:
        """The group's hyper-parameters in the order of the kernel's table."""

    @abstractmethod
    def names_in_use(self, group: ParamGroup) -> tuple[str, ...]:
        """Those of `state_names` that the group's options call for."""

    @abstractmethod
    def launch(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        *,
        segments: ops.SegmentTable,
        active: Tensor,
        steps: Tensor,
        groups: Tensor,
    ) -> None:
        """Step one bucket's own range; see `zeroopt.ops` for the tables."""


class AdamWRule(FusedRule):
    """torch.optim.AdamW, and Adam with its L2 term."""

    state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    has_step = True

    def __init__(self, *, decoupled: bool) -> None:
        self._decoupled = decoupled

    def hyper_row(self, group: ParamGroup) -> list[float]:
        beta1, beta2 = group["betas"]
        # Later torch releases make AdamW an Adam with this option, earlier ones have two classes.
        decoupled = group.get("decoupled_weight_decay", self._decoupled)
        values = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"], decoupled)
        return [float(v) for v in (*values, group["amsgrad"], group["maximize"])]

    def names_in_use(self, group: ParamGroup) -> tuple[str, ...]:
        return self.state_names if group["amsgrad"] else self.state_names[:2]

    def launch(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], **tables: Any) -> None:
        max_exp_avg_sq = state.get("max_exp_avg_sq")
        ops.adamw(param, grad, state["exp_avg"], state["exp_avg_sq"], max_exp_avg_sq=max_exp_avg_sq, **tables)


class SgdRule(FusedRule):
    """torch.optim.SGD with or without momentum."""

    state_names = ("momentum_buffer",)
    has_step = False

    def hyper_row(self, group: ParamGroup) -> list[float]:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        return [float(group[name]) for name in names]

    def names_in_use(self, group: ParamGroup) -> tuple[str, ...]:
        return self.state_names if group["momentum"] else ()

    def launch(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], **tables: Any) -> None:
        ops.sgd(param, grad, state.get("momentum_buffer"), **tables)


# Exactly these classes: a subclass may have changed the rule.
_RULES: dict[type[torch.optim.Optimizer], FusedRule] = {
    torch.optim.AdamW: AdamWRule(decoupled=True),
    torch.optim.Adam: AdamWRule(decoupled=False),
    torch.optim.SGD: SgdRule(),
}
FUSED_DTYPES = (torch.float32,)


def rule_for(optimizer: torch.optim.Optimizer) -> FusedRule | None:
    """The fused kernel that does what this optimizer does, if there is one."""
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return None
    return _RULES.get(type(optimizer))


def fused_optimizers() -> list[str]:
    """Names of the optimizers with a fused kernel."""
    return [cls.__name__ for cls in _RULES]
