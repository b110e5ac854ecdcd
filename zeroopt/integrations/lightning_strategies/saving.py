"""What is saved of wrapped optimizers."""

from __future__ import annotations

from typing import Any

from ...optimizer import ZeroOptimizer


def whole_state(optimizer: ZeroOptimizer) -> dict[str, Any]:
    """What the plain optimizer's state dict would be, on rank 0; elsewhere nothing. Collective."""
    optimizer.consolidate_state_dict(to=0)
    return optimizer.full_state_dict() if optimizer.replica.control.rank == 0 else {}
