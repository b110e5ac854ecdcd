"""What a `torch.amp.GradScaler` asks of a step, agreed by all ranks.

A GradScaler looks at the gradients of its own rank, skips the step when one of them is not finite, and changes its scale
accordingly. Here a rank looks at its slices only, so ranks tell each other what they have found before the step, and each
writes the common answer back to where its scaler will look for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .collectives import Transport
from .errors import StateError
from .gradient_store import GradientStore
from .norm_groups import NormGroups


@dataclass(frozen=True)
class LossScaling:
    """By what a GradScaler has the gradients of a step multiplied.

    Attributes:
        is_unscaled: they have been multiplied back.
        inverse: by what they are or were; 0 when it is not known.
    """

    is_unscaled: bool
    inverse: float


def agree_on_overflow(
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    checks: Sequence[tuple[Tensor, Tensor]],
    stores: Sequence[GradientStore],
    transport: Transport,
    beyond: NormGroups,
) -> bool:
    """Whether any rank has found a gradient that is not finite. If none has, gradients are scaled back. Collective, also with
    the groups `beyond` the data-parallel ranks.

    Args:
        found_inf: the scaler's, one element: not 0 when this rank has found one; None when it saw no gradients here.
        grad_scale: by which gradients are still multiplied; None when the scaler has had them unscaled.
        checks: `found_inf` and `inv_scale` of each check of sharded gradients that the scaler has asked for since the last step.

    Raises:
        StateError: on every rank: the scalers multiply by different scales, or one of them had no gradients to look at.
    """
    device = stores[0].reduced.device
    _check_scales(inverse_of_scale(grad_scale, checks).to(device), transport)
    seen_here = torch.tensor(math.nan) if found_inf is None else found_inf.detach().reshape(()).float().ne(0).float()
    by_rank = transport.gather_scalar(seen_here.to(device), label="found_inf")
    if by_rank.isnan().any():
        raise StateError(
            "a GradScaler found no gradients on some rank, which has run no backward: leave out its unscale_() on all ranks, "
            "for its step() does the same (max_grad_norm clips after that), or run a backward on every rank"
        )
    overflow = bool(beyond.max_over_model(by_rank.max()))
    for seen, _ in checks:
        seen.fill_(float(overflow))
    if grad_scale is not None and not overflow:
        for store in stores:
            if store.holds_sum:
                store.scale(inverse_of_scale(grad_scale, checks))
    return overflow


def inverse_of_scale(grad_scale: Tensor | None, checks: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """What gradients are scaled back by, 0-dim float64; 0 when it is not known, as in stage 0 once they have been."""
    if grad_scale is not None:
        # As a GradScaler rounds it: gradients are the same wherever they are multiplied by it.
        return grad_scale.detach().double().reshape(()).reciprocal().float().double()
    return checks[0][1].double().reshape(()) if checks else torch.zeros((), dtype=torch.float64)


def _check_scales(inverse: Tensor, transport: Transport) -> None:
    by_rank = transport.gather_scalar(inverse, label="loss scales").tolist()
    if len({value for value in by_rank if value != 0}) > 1:
        scales = ", ".join("unknown" if value == 0 else f"{1 / value:g}" for value in by_rank)
        raise StateError(
            f"the ranks multiply their losses by different scales ({scales}): make the GradScaler alike on all ranks, load its "
            "state on all of them, and call its update() on all of them after each step"
        )
