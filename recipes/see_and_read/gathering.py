"""Features of all ranks, through which gradients go back to the rank that they came from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class Gather(torch.autograd.Function):
    """(batch, width) of every rank as (ranks * batch, width) on every rank. Forward and backward are collective.

    Each feature counts in the losses of all ranks, so its gradient is the sum of what all of them have for it.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.rows = len(features)
        gathered = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, features.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        begin = dist.get_rank() * ctx.rows
        return total[begin : begin + ctx.rows]


def gather(features: Tensor) -> Tensor:
    """Collective; all ranks have as many features."""
    gathered: Tensor = Gather.apply(features)
    return gathered


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """How hard it is to find, among those of all ranks, the caption of each of this rank's pictures, and the picture of each caption
    (Radford et al. 2021, arXiv 2103.00020). Collective. The mean over ranks is that of one process with all pairs.

    Args:
        images, texts: (batch, width), of length 1; pairs have the same row.
        scale: what similarities are multiplied by.
    """
    own = torch.arange(len(images), device=images.device) + dist.get_rank() * len(images)
    all_images, all_texts = gather(torch.cat([images, texts], dim=1)).chunk(2, dim=1)
    return (F.cross_entropy(scale * images @ all_texts.T, own) + F.cross_entropy(scale * texts @ all_images.T, own)) / 2
