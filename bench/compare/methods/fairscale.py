"""fairscale's OSS and ShardedDataParallel: whole parameters dealt out to ranks, gradients reduced to who steps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench.compare import formula
from bench.compare.methods.method import Method, Training
from bench.compare.setting import Setting


class ZeroedTraining(Training):
    """`param.grad` must stay the view of a bucket that it is: the optimizer's `zero_grad` would let go of it, and what the bucket
    holds would be added to the next gradients."""

    def step(self) -> None:
        self.optimizer.step()
        self.model.zero_grad()


def prepare(net: nn.Module, setting: Setting) -> Training:
    from fairscale.nn.data_parallel import ShardedDataParallel  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from fairscale.optim.oss import OSS  # type: ignore[import-not-found, import-untyped, unused-ignore]

    options: dict[str, Any] = {}
    if setting.bucket_mb is not None:
        options["reduce_buffer_size"] = int(setting.bucket_mb * 2**20 / 4)
    optimizer = OSS(net.parameters(), torch.optim.AdamW, lr=setting.lr, fused=True)
    model = ShardedDataParallel(net, optimizer, **options)
    return ZeroedTraining(model, optimizer, model.no_sync, autocast=setting.precision == "bfloat16")


METHODS = (Method("fairscale OSS + ShardedDDP", prepare, formula.sharded_gradients, needs=("fairscale",)),)
