"""Whether any rank has found a gradient that is not finite: all ranks have to leave out the same steps."""

from __future__ import annotations

import math
from enum import Enum

import torch

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
    found: bool = False,
    scale: float = 0.0,
    obstacle: Obstacle | None = None,
) -> bool:
    """Whether any rank has found a gradient that is not finite. Collective.

    Args:
        found: this rank has.
        scale: by which this rank multiplies its loss; 0 when it does not know.
        obstacle: this rank cannot go on.

    Raises:
        StateError: on every rank: the scales differ, or some rank cannot go on.
    """
    # One number says it all: its sign is that of `found`.
    mine = math.copysign(scale, -1.0 if found else 1.0) if obstacle is None else obstacle.value
    number = torch.tensor(mine, dtype=torch.float64, device=device)
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
