"""Which samples a step has. They depend on its number alone, and not on ranks: whoever goes on from a step, on another number of
ranks, has the samples that would have come."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def generator_of(seed: int, step: int) -> torch.Generator:
    """What draws for one step, the same on all ranks."""
    return torch.Generator().manual_seed(1_000_003 * seed + step)


def draw(count: int, batch: int, seed: int, step: int) -> Tensor:
    """The numbers of a step's samples, `batch` of `count`, for all ranks together."""
    return torch.randint(count, (batch,), generator=generator_of(seed, step))


def own_part(batch: Tensor) -> Tensor:
    """This rank's share of what was drawn for all ranks, along the first dimension.

    Raises:
        ValueError: ranks cannot have equal shares, of which means over ranks are means over all samples.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if len(batch) % world_size:
        raise ValueError(f"expected a batch that {world_size} ranks can share equally, got one of {len(batch)}")
    return batch.chunk(world_size)[rank]
