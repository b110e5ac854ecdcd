"""Tensors of one dtype side by side in one flat tensor, so that they travel as one message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def group_alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those of one dtype and device together."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(by_kind.values())


def pieces_of(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat tensor in the shapes of those that were put together into it."""
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
