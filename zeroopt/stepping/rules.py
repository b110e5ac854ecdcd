"""Which optimizers have a fused kernel, and how their options and state map to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import ops
from ..errors import ConfigError

__all__ = ["FusedRule", "register_rule"]

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
        """One of the kernel's columns for a param_group.

        Raises:
            ConfigError: the group has no option of that name.
        """
        if column in ("beta1", "beta2"):
            return float(group["betas"][("beta1", "beta2").index(column)])
        if column not in group:
            raise ConfigError(
                f"expected param_groups to have {column!r}, which the kernel {self.kernel.name} needs, got "
                f"{', '.join(sorted(group))}; let hyper_parameter of the rule say where else it is"
            )
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


def register_rule(cls: type[torch.optim.Optimizer], rule: FusedRule) -> None:
    """Let a kernel step the optimizers of a class from elsewhere. Not collective; on every rank, before `zeroopt.wrap`.

    The class must do what the kernel does: `wrap` then no longer calls its `step`, unless ``fused=False`` or the dtype has no
    kernel. Its state has torch's names, those of `rule.kernel.states`. A subclass of it has no kernel unless registered too.

    Args:
        cls: registered for exactly this class.
        rule: for example ``FusedRule(zeroopt.ops.lion)`` where its options are called as the kernel's columns are.

    Raises:
        ConfigError: `cls` is no class of optimizers or has another rule already, or the rule's kernel is none of
            `zeroopt.ops.OPTIMIZERS`, with its very states. Nothing has been registered then.
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(f"expected cls to be a class of torch.optim.Optimizer, got {cls!r}")
    if not isinstance(rule, FusedRule):
        raise ConfigError(f"expected the rule of {cls.__name__} to be a FusedRule, got {rule!r}")
    kernel = ops.OPTIMIZERS.get(rule.kernel.name)
    if kernel is None:
        raise ConfigError(
            f"expected the rule of {cls.__name__} to have one of the kernels {', '.join(ops.OPTIMIZERS)}, got "
            f"{rule.kernel.name!r}"
        )
    if kernel != rule.kernel:
        raise ConfigError(
            f"expected the rule of {cls.__name__} to have the kernel {kernel.name} as zeroopt.ops has it, with states "
            f"{kernel.states}, got states {rule.kernel.states}"
        )
    if _RULES.get(cls, rule) != rule:
        raise ConfigError(f"{cls.__name__} has another rule already, {_RULES[cls]}")
    _RULES[cls] = rule


def fused_optimizers() -> list[str]:
    """Names of the optimizers outside of `zeroopt.optim` with a fused kernel."""
    return [cls.__name__ for cls in _RULES]
