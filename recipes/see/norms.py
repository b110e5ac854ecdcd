"""What normalises channels: over this rank's images, over those of all ranks, or over groups of channels of each image."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recipes.see.resnet import Norm

GROUPS = 8  # channels of an image that are normalised together; the fewest channels of any preset


class SumOverRanks(torch.autograd.Function):
    """The sum over all ranks of a tensor, each element of which then counts in the loss of every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class BatchNormOverRanks(nn.BatchNorm2d):
    """Batch norm with the statistics of all ranks' images, which torch's SyncBatchNorm has for GPUs alone.

    In training, forward and backward are collective: every rank has to run as many, with as many images.
    """

    def forward(self, input: Tensor) -> Tensor:
        ranks = dist.get_world_size() if self.training and dist.is_initialized() else 1
        if ranks == 1:
            return super().forward(input)
        moments = torch.cat([input.mean((0, 2, 3)), input.square().mean((0, 2, 3))])
        mean, square = (SumOverRanks.apply(moments) / ranks).chunk(2)
        variance = square - mean.square()
        self._follow(mean.detach(), variance.detach(), ranks * input.numel() // input.shape[1])
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], input, scale[:, None, None])

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics, whose variance is that of a sample."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        self.num_batches_tracked.add_(1)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(GROUPS, channels)


NORMS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "sync": BatchNormOverRanks, "group": group_norm}


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model there; on GPUs torch's own SyncBatchNorm, which takes less memory, in place of `BatchNormOverRanks`."""
    if device.type == "cuda" and any(isinstance(module, BatchNormOverRanks) for module in model.modules()):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device)
