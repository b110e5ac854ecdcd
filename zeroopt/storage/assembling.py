"""A whole tensor from the pieces that ranks have of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import ControlGroup
from ..plan.params import ManagedParam
from .segment import Segment


def assemble(
    managed: ManagedParam,
    segment: Segment | None,
    piece: Tensor | None,
    dtype: torch.dtype,
    control: ControlGroup,
) -> Tensor:
    """A tensor of a parameter's shape, of which each rank has the elements of its segment. Collective.

    Args:
        segment: of the parameter, on this rank.
        piece: [segment.numel], in any dtype; None: zeros.
        dtype: of the result.
        control: of the ranks that have the pieces; `lone_control()` where this rank has all of it.
    """
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    whole = torch.zeros(managed.numel, dtype=wide, device=managed.param.device)
    if piece is not None and segment is not None:
        whole[segment.start : segment.start + segment.numel] = piece
    control.total(whole, f"putting together parameter {managed.name!r}")  # the pieces of other ranks are zero here
    return managed.layout_like(whole.to(dtype).as_strided(managed.shape, managed.stride))
