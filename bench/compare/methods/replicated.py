"""All of the state on every rank: DistributedDataParallel, and the bound, which trains without communication."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.compare import formula
from bench.compare.methods.method import Method, Training, adamw
from bench.compare.setting import Setting


def prepare_alone(net: nn.Module, setting: Setting) -> Training:
    return Training(net, adamw(net, setting, fused=True), autocast=setting.precision == "bfloat16")


def in_ddp(net: nn.Module, setting: Setting, *, views: bool) -> DistributedDataParallel:
    options: dict[str, Any] = {} if setting.bucket_mb is None else {"bucket_cap_mb": setting.bucket_mb}
    return DistributedDataParallel(net, gradient_as_bucket_view=views, **options)


def prepare_ddp(net: nn.Module, setting: Setting, *, views: bool = False, **implementation: Any) -> Training:
    model = in_ddp(net, setting, views=views)
    optimizer = adamw(net, setting, **implementation)
    return Training(model, optimizer, model.no_sync, autocast=setting.precision == "bfloat16")


ALONE = "no communication"
DDP = "DDP, bucket views, fused AdamW"

METHODS = (
    Method(ALONE, prepare_alone, formula.replicated, communicates=False),
    Method("DDP, default", prepare_ddp, formula.with_separate_buckets),
    Method("DDP, foreach AdamW", partial(prepare_ddp, foreach=True), formula.with_separate_buckets),
    Method(DDP, partial(prepare_ddp, views=True, fused=True), formula.replicated),
)
