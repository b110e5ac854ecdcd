"""Collectives of flat tensors under one name: torch 2.13 renamed them, and warns when the former names are called."""

from __future__ import annotations

import torch.distributed as dist

all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Puts the tensors of all ranks side by side, by rank."""

reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Gives each rank its part of the sum."""
