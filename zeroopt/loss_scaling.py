"""What a `torch.amp.GradScaler` asks of a step, agreed by all ranks.

A GradScaler looks at the gradients of its own rank, skips the step when one of them is not finite, and changes its scale
accordingly. Here a rank looks at its slices only, so ranks tell each other what they have found before the step, and each
writes the common answer back to where its scaler will look for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .collectives import Transport
from .errors import StateError
from .gradient_store import GradientStore
from .norm_groups import NormGroups


def agree_on_overflow(
    found_inf: Tensor,
    grad_scale: Tensor | None,
    checks: Sequence[tuple[Tensor, Tensor]],
    stores: Sequence[GradientStore],
    transport: Transport,
    beyond: NormGroups,
) -> bool:
    """Whether any rank has found a gradient that is not finite. If none has, gradients are scaled back. Collective, also with
    the groups `beyond` the data-parallel ranks.

    Args:
        found_inf: the scaler's, one element: not 0 when this rank has found one.
        grad_scale: by which gradients are still multiplied; None when the scaler has had them unscaled.
        checks: `found_inf` and `inv_scale` of each check of sharded gradients that the scaler has asked for since the last step.

    Raises:
        StateError: on every rank: the scalers multiply by different scales.
    """
    unscaled_by = [inv_scale for _, inv_scale in checks]
    inverse = grad_scale.double().reciprocal() if grad_scale is not None else _only(unscaled_by)
    agreed = _agree_on_scale(inverse.to(found_inf.device), transport)
    by_rank = transport.gather_scalar(found_inf.reshape(()).float(), label="found_inf")
    overflow = bool(beyond.max_over_model(by_rank.ne(0).any().float()))
    for seen, _ in checks:
        seen.fill_(float(overflow))
    if not overflow and (grad_scale is not None or not unscaled_by) and agreed not in (0.0, 1.0):
        for store in stores:
            if store.holds_sum:
                store.scale(torch.tensor(agreed, dtype=torch.float64))
    return overflow


def _only(unscaled_by: Sequence[Tensor]) -> Tensor:
    """0 when nothing is known: stage 0, or a rank that had no gradients to unscale."""
    return unscaled_by[0].double().reshape(()) if unscaled_by else torch.zeros((), dtype=torch.float64)


def _agree_on_scale(inverse: Tensor, transport: Transport) -> float:
    by_rank = transport.gather_scalar(inverse, label="loss scales").tolist()
    known = {value for value in by_rank if value != 0}
    if len(known) > 1:
        scales = ", ".join("none" if value == 0 else f"{1 / value:g}" for value in by_rank)
        raise StateError(
            f"the ranks multiply their losses by different scales ({scales}): make the GradScaler alike on all ranks, load its "
            "state on all of them, and call its update() on all of them after each step"
        )
    return known.pop() if known else 0.0
