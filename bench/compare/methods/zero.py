"""zeroopt: its stages, transports and tiers of state."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

import zeroopt
from bench.compare import formula
from bench.compare.methods.method import Method, Training, adamw, needs_cpu
from bench.compare.setting import Setting


def prepare(net: nn.Module, setting: Setting, **options: Any) -> Training:
    if setting.precision == "bfloat16":
        options["param_dtype"] = torch.bfloat16
    if setting.bucket_mb is not None:
        options["bucket_mb"] = setting.bucket_mb
    model, optimizer = zeroopt.wrap(net, adamw(net, setting), **options)
    return Training(model, optimizer, model.no_sync)


def staged(stage: int) -> Method:
    return Method(f"zeroopt stage {stage}", partial(prepare, stage=stage), formula.zero(stage))


def through(transport: str) -> Method:
    return Method(
        f"zeroopt stage 2, {transport}",
        partial(prepare, stage=2, transport=transport),
        formula.zero(2),
        obstacle=needs_cpu if transport == "pairwise" else lambda setting: None,
    )


def shared(stage: int) -> Method:
    return Method(
        f"zeroopt stage {stage}, share_parameters",
        partial(prepare, stage=stage, share_parameters=True),
        formula.zero(stage, share_parameters=True),
        obstacle=needs_cpu,
    )


def with_state(name: str, **tier: Any) -> Method:
    """A tier of state; those with `master_weights` are for 16-bit parameters."""
    return Method(
        f"zeroopt stage 2, {name}",
        partial(prepare, stage=2, **tier),
        formula.zero(2, **tier),
        obstacle=needs_bfloat16 if "master_weights" in tier else lambda setting: None,
        rounds_state=True,
    )


def needs_bfloat16(setting: Setting) -> str | None:
    return None if setting.precision == "bfloat16" else "needs --precision bfloat16"


METHODS = (
    staged(0),
    staged(1),
    staged(2),
    through("pairwise"),
    through("torch"),
    shared(1),
    shared(2),
    with_state("bfloat16 moments", state_dtype=torch.bfloat16),
    with_state("8-bit moments", state_dtype=torch.int8),
    with_state("remainders", master_weights="remainder"),
    with_state("no masters", master_weights="none"),
)
