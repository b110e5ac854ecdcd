"""What the optimizers of csrc/ops say of themselves, said once more, and groups of hyper-parameters to try them with.

Without torch, for tests that run without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Op:
    """An optimizer.

    Attributes:
        defaults: hyper-parameters in the order of the kernel's columns, so large that a wrong formula shows.
        states: names of the arrays of state, in the kernel's order.
        signed: whether they can be negative.
        options: changes of `defaults` that between them take every branch of the formula.
        flags: for states that not all groups use, the hyper-parameter that is not 0 for those that do.
        torch_class: of torch.optim, that does the same where there is one; AdamW without `decoupled` is Adam.
        kernels: what its passes are called where it has several.
    """

    name: str
    defaults: dict[str, float]
    states: tuple[str, ...]
    signed: tuple[bool, ...]
    options: tuple[dict[str, float], ...]
    flags: dict[str, str] = field(default_factory=dict)
    torch_class: str | None = None
    kernels: tuple[str, ...] = ()

    def hyper(self, **changes: float) -> dict[str, float]:
        return {**self.defaults, **changes}

    def states_of(self, hyper: dict[str, float]) -> tuple[str, ...]:
        return tuple(name for name in self.states if name not in self.flags or hyper[self.flags[name]])

    def hypers(self, *eps: float) -> list[dict[str, float]]:
        """With each of the options, and with each `eps` where there is one: that small, no float64 reference follows."""
        small = [{"eps": value} for value in eps if "eps" in self.defaults]
        return [self.hyper(**change) for change in (*self.options, *small)]


OPS = {
    op.name: op
    for op in (
        Op(
            "adamw",
            {
                "lr": 0.1,
                "beta1": 0.9,
                "beta2": 0.95,
                "eps": 1e-3,
                "weight_decay": 0.1,
                "decoupled": 1,
                "amsgrad": 0,
                "maximize": 0,
            },
            ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
            (True, False, False),
            (
                {},
                {"decoupled": 0},
                {"decoupled": 0, "maximize": 1},
                {"decoupled": 0, "weight_decay": 0},
                {"amsgrad": 1},
                {"amsgrad": 1, "decoupled": 0},
                {"maximize": 1},
                {"weight_decay": 0},
                {"beta1": 0},
                {"beta1": 0.3, "beta2": 0.5},
                {"beta2": 0.99999},
                {"lr": 0},
            ),
            flags={"max_exp_avg_sq": "amsgrad"},
            torch_class="AdamW",
        ),
        Op(
            "sgd",
            {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0.1, "nesterov": 0, "maximize": 0},
            ("momentum_buffer",),
            (True,),
            (
                {},
                {"momentum": 0},
                {"momentum": 0, "maximize": 1},
                {"momentum": 0, "weight_decay": 0},
                {"dampening": 0.5},
                {"nesterov": 1},
                {"maximize": 1},
                {"weight_decay": 0},
            ),
            flags={"momentum_buffer": "momentum"},
            torch_class="SGD",
        ),
        Op(
            "adagrad",
            {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-3, "maximize": 0},
            ("sum",),
            (False,),
            ({}, {"lr_decay": 0}, {"weight_decay": 0}, {"maximize": 1}, {"eps": 0.5}),
            torch_class="Adagrad",
        ),
        Op(
            "rmsprop",
            {
                "lr": 0.1,
                "alpha": 0.9,
                "eps": 0.1,
                "weight_decay": 0.1,
                "momentum": 0.9,
                "centered": 1,
                "maximize": 0,
            },
            ("square_avg", "momentum_buffer", "grad_avg"),
            (False, True, True),
            (
                {},
                {"momentum": 0},
                {"centered": 0},
                {"centered": 0, "momentum": 0},
                {"maximize": 1},
                {"weight_decay": 0},
                {"alpha": 0.3, "eps": 0.5},
                {"lr": 0},
            ),
            flags={"momentum_buffer": "momentum", "grad_avg": "centered"},
            torch_class="RMSprop",
        ),
        Op(
            "lion",
            {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "maximize": 0},
            ("exp_avg",),
            (True,),
            ({}, {"weight_decay": 0}, {"maximize": 1}, {"beta1": 0}, {"beta1": 0.3, "beta2": 0.2}),
        ),
        Op(
            "lamb",
            {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1, "maximize": 0},
            ("exp_avg", "exp_avg_sq"),
            (True, False),
            ({}, {"weight_decay": 0}, {"maximize": 1}, {"beta1": 0}, {"eps": 0.5}, {"beta1": 0.3, "beta2": 0.5}),
            kernels=("lamb_moments", "lamb_update"),
        ),
    )
}

KERNELS = {kernel: op for op in OPS.values() for kernel in op.kernels or (op.name,)}
"""The op that each kernel is of."""


def rows(hypers: Sequence[dict[str, float]]) -> list[list[float]]:
    """As a table of groups."""
    return [list(hyper.values()) for hyper in hypers]
