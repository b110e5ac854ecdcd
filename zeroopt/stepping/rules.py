"""Which optimizers have a fused kernel, and how their options and state map to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from .. import ops

ParamGroup = dict[str, Any]


class FusedRule(ABC):
    """The kernel of one class of optimizers.

    Attributes:
        kernel: the function of `zeroopt.ops`.
        state_names: the arrays of state that a parameter may have, by torch's names, in the kernel's order.
        signed: for each of them whether it can be negative.
        has_step: torch keeps a step count in the state.
    """

    kernel: Callable[..., None]
    state_names: tuple[str, ...]
    signed: tuple[bool, ...]
    has_step: bool

    @abstractmethod
    def hyper_row(self, group: ParamGroup) -> list[float]:
        """The group's hyper-parameters in the order of the kernel's table."""

    def names_in_use(self, group: ParamGroup) -> tuple[str, ...]:
        """Those of `state_names` that the group's options call for."""
        del group
        return self.state_names

    def initial_value(self, group: ParamGroup) -> float:
        """Of all elements of state."""
        del group
        return 0.0


class AdamWRule(FusedRule):
    """AdamW, and Adam with its L2 term."""

    kernel = staticmethod(ops.adamw)
    state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    signed = (True, False, False)
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


class SgdRule(FusedRule):
    """SGD with or without momentum."""

    kernel = staticmethod(ops.sgd)
    state_names = ("momentum_buffer",)
    signed = (True,)
    has_step = False

    def hyper_row(self, group: ParamGroup) -> list[float]:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        return [float(group[name]) for name in names]

    def names_in_use(self, group: ParamGroup) -> tuple[str, ...]:
        return self.state_names if group["momentum"] else ()


class AdagradRule(FusedRule):
    """Adagrad."""

    kernel = staticmethod(ops.adagrad)
    state_names = ("sum",)
    signed = (False,)
    has_step = True

    def hyper_row(self, group: ParamGroup) -> list[float]:
        return [float(group[name]) for name in ("lr", "lr_decay", "weight_decay", "eps", "maximize")]

    def initial_value(self, group: ParamGroup) -> float:
        return float(group["initial_accumulator_value"])


class LionRule(FusedRule):
    """Lion, which torch does not have."""

    kernel = staticmethod(ops.lion)
    state_names = ("exp_avg",)
    signed = (True,)
    has_step = True

    def hyper_row(self, group: ParamGroup) -> list[float]:
        return [float(v) for v in (group["lr"], *group["betas"], group["weight_decay"], group["maximize"])]


class LambRule(FusedRule):
    """LAMB, which torch does not have."""

    kernel = staticmethod(ops.lamb)
    state_names = ("exp_avg", "exp_avg_sq")
    signed = (True, False)
    has_step = True

    def hyper_row(self, group: ParamGroup) -> list[float]:
        values = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["maximize"])
        return [float(v) for v in values]


# Exactly these classes: a subclass may have changed the rule.
_RULES: dict[type[torch.optim.Optimizer], FusedRule] = {
    torch.optim.AdamW: AdamWRule(decoupled=True),
    torch.optim.Adam: AdamWRule(decoupled=False),
    torch.optim.SGD: SgdRule(),
    torch.optim.Adagrad: AdagradRule(),
}


def rule_for(optimizer: torch.optim.Optimizer) -> FusedRule | None:
    """The fused kernel that does what this optimizer does, if there is one."""
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return None
    # zeroopt.optim's own classes carry theirs.
    own: FusedRule | None = vars(type(optimizer)).get("fused_rule")
    return own or _RULES.get(type(optimizer))


def fused_optimizers() -> list[str]:
    """Names of torch's optimizers with a fused kernel."""
    return [cls.__name__ for cls in _RULES]
