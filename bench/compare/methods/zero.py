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
from bench.model import INIT


def prepare(net: nn.Module, setting: Setting, **options: Any) -> Training:
    if setting.precision == "bfloat16":
        options["param_dtype"] = torch.bfloat16
    if setting.bucket_mb is not None:
        options["bucket_mb"] = setting.bucket_mb
    model, optimizer = zeroopt.wrap(net, adamw(net, setting, fused=True), **options)
    return Training(model, optimizer, model.no_sync)


def staged(stage: int) -> Method:
    """By the transport that zeroopt chooses, which on the CPU of one host is shared memory."""
    return Method(f"zeroopt stage {stage}", partial(prepare, stage=stage), formula.zero(stage))


def through(transport: str, stage: int) -> Method:
    """By one that it would choose elsewhere."""
    return Method(
        f"zeroopt stage {stage}, {transport}",
        partial(prepare, stage=stage, transport=transport),
        formula.zero(stage),
        obstacle=needs_cpu,
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


def in_backward() -> Method:
    """Without gradients."""
    return Method(
        "zeroopt stage 2, step in backward",
        partial(prepare, stage=2, step_in_backward=True),
        formula.zero(2, step_in_backward=True),
        obstacle=needs_one_backward,
    )


def everything() -> Method:
    """All that saves memory together, the building of the model included."""
    options: dict[str, Any] = {
        "share_parameters": True,
        "master_weights": "remainder",
        "state_dtype": torch.int8,
        "step_in_backward": True,
    }
    buckets: dict[str, Any] = {
        "bucket_mb": 2
    }  # beside 0.75 bytes a parameter at 8 ranks, those of the default size would show
    return Method(
        "zeroopt stage 2, everything",
        partial(prepare, stage=2, init=INIT, **buckets, **options),
        formula.zero(2, **options),
        obstacle=lambda setting: needs_cpu(setting) or needs_bfloat16(setting) or needs_one_backward(setting),
        rounds_state=True,
        on_meta=True,
    )


def needs_one_backward(setting: Setting) -> str | None:
    return None if setting.accumulation == 1 else "needs one micro-batch a step"


def needs_bfloat16(setting: Setting) -> str | None:
    return None if setting.precision == "bfloat16" else "needs --precision bfloat16"


METHODS = (
    *(staged(stage) for stage in (0, 1, 2)),
    *(through(transport, stage) for transport in ("pairwise", "torch") for stage in (0, 1, 2)),
    shared(1),
    shared(2),
    with_state("bfloat16 moments", state_dtype=torch.bfloat16),
    with_state("8-bit moments", state_dtype=torch.int8),
    with_state("remainders", master_weights="remainder"),
    with_state("no masters", master_weights="none"),
    in_backward(),
    everything(),
)
