"""Whether any rank has found a gradient that is not finite: all ranks have to leave out the same steps."""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor

from ..collectives import Transport
from ..errors import StateError


class Obstacle(Enum):
    """Why a rank cannot go on with a GradScaler's step. The values are what it tells the others in place of its scale."""

    NO_GRADIENTS = math.inf
    SCALED_PEERS = -math.inf


_MESSAGES = {
    Obstacle.NO_GRADIENTS: "a GradScaler found no gradients on some rank, which has run no backward: leave out its unscale_() on "
    "all ranks, for its step() does the same (max_grad_norm clips after that), or run a backward on every rank",
    Obstacle.SCALED_PEERS: "max_grad_norm clips by the norm over all optimizers of the model, so call scaler.unscale_ for each of "
    "them before the first scaler.step, on every rank",
}


def agree_on_overflow(
    transport: Transport,
    device: torch.device,
    *,
    found: Tensor | bool = False,
    scale: Tensor | float = 0.0,
    obstacle: Obstacle | None = None,
) -> bool:
    """Whether any rank has found a gradient that is not finite. Collective. The host waits once, for what all ranks have said.

    Args:
        found: this rank has, not 0.
        scale: by which this rank multiplies its loss; 0 when it does not know.
        obstacle: this rank cannot go on.

    Raises:
        StateError: on every rank: the scales differ, or some rank cannot go on.
    """
    if obstacle is None:
        # One number says it all: its sign is that of `found`.
        sign = torch.where(_on(device, found) != 0, -1.0, 1.0)
        number = torch.copysign(_on(device, scale), sign)
    else:
        number = _on(device, obstacle.value)
    by_rank = transport.gather_scalar(number, label="loss scales").tolist()
    for each, message in _MESSAGES.items():
        if each.value in by_rank:
            raise StateError(message)
    if len({abs(value) for value in by_rank if value != 0}) > 1:
        scales = ", ".join(f"{abs(value):g}" if value != 0 else "unknown" for value in by_rank)
        raise StateError(
            f"the ranks multiply their losses by different scales ({scales}): make the GradScaler alike on all ranks, load its "
            "state on all of them, and call its update() on all of them after each step"
        )
    return any(math.copysign(1.0, value) < 0 for value in by_rank)


def _on(device: torch.device, value: Tensor | float) -> Tensor:
    """0-dim float64."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device, torch.float64)
    return torch.full((), float(value), dtype=torch.float64, device=device)  # filled there: nothing is copied
