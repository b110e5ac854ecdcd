"""Which optimizers have a fused kernel, and how their options and state map to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import ops

ParamGroup = dict[str, Any]


@dataclass(frozen=True)
class FusedRule:
    """The kernel of one class of optimizers. A subclass says where the class's options go by other names than the kernel's.

    Attributes:
        kernel: of `zeroopt.ops`; a parameter's arrays of state have its names.
        has_step: torch keeps a step count in the state.
    """

    kernel: ops.StepKernel
    has_step: bool = True

    def hyper_parameter(self, group: ParamGroup, column: str) -> float:
        """One of the kernel's columns for a param_group."""
        if column in ("beta1", "beta2"):
            return float(group["betas"][("beta1", "beta2").index(column)])
        return float(group[column])

    def hyper_row(self, group: ParamGroup) -> list[float]:
        """The group's hyper-parameters in the order of the kernel's table."""
        return [self.hyper_parameter(group, column) for column in self.kernel.columns]

    def names_in_use(self, group: ParamGroup) -> tuple[str, ...]:
        """Those of the kernel's states that the group's options call for."""
        kernel = self.kernel
        return tuple(
            name
            for name, flag in zip(kernel.states, kernel.flags, strict=True)
            if flag is None or self.hyper_parameter(group, kernel.columns[flag]) != 0
        )

    def initial_value(self, group: ParamGroup) -> float:
        """Of all elements of state."""
        del group
        return 0.0


@dataclass(frozen=True)
class AdamWRule(FusedRule):
    """AdamW, and Adam with its L2 term.

    Attributes:
        decoupled: AdamW's weight decay, where a group does not say which.
    """

    kernel: ops.StepKernel = ops.adamw
    decoupled: bool = True

    def hyper_parameter(self, group: ParamGroup, column: str) -> float:
        if column == "decoupled":
            # Later torch releases make AdamW an Adam with this option, earlier ones have two classes.
            return float(group.get("decoupled_weight_decay", self.decoupled))
        return super().hyper_parameter(group, column)


@dataclass(frozen=True)
class AdagradRule(FusedRule):
    """Adagrad, whose state starts where its group says."""

    kernel: ops.StepKernel = ops.adagrad

    def initial_value(self, group: ParamGroup) -> float:
        return float(group["initial_accumulator_value"])


# Exactly these classes: a subclass may have changed the rule.
_RULES: dict[type[torch.optim.Optimizer], FusedRule] = {
    torch.optim.AdamW: AdamWRule(decoupled=True),
    torch.optim.Adam: AdamWRule(decoupled=False),
    torch.optim.SGD: FusedRule(ops.sgd, has_step=False),
    torch.optim.Adagrad: AdagradRule(),
    torch.optim.RMSprop: FusedRule(ops.OPTIMIZERS["rmsprop"]),
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
