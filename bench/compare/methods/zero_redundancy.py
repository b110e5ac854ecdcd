"""torch's ZeroRedundancyOptimizer: whole parameters dealt out to ranks, under DistributedDataParallel."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from bench.compare import formula
from bench.compare.methods.method import Method, Training
from bench.compare.methods.replicated import in_ddp
from bench.compare.setting import Setting


def prepare(net: nn.Module, setting: Setting) -> Training:
    """Without `parameters_as_bucket_view`, which would break DDP's own views of gradients."""
    model = in_ddp(net, setting, views=True)
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=setting.lr, fused=True)
    return Training(model, optimizer, model.no_sync, autocast=setting.precision == "bfloat16")


METHODS = (Method("ZeroRedundancyOptimizer + DDP", prepare, formula.sharded_state),)
