"""What one rank keeps of every bucket, and where."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """What one rank keeps of every bucket. This is all in which the stages differ."""

    shard_state: bool
    """Optimizer state covers this rank's slice of a bucket rather than the whole bucket."""
    shard_gradient: bool
    """Only this rank's slice of the reduced gradient is kept; the full buffer goes back to a pool after its reduce."""
    home: torch.device | None = None
    """Where state and masters of what this rank steps are kept, and where it is stepped; None: on the bucket's device."""


PLACEMENTS = {
    0: Placement(shard_state=False, shard_gradient=False),
    1: Placement(shard_state=True, shard_gradient=False),
    2: Placement(shard_state=True, shard_gradient=True),
}
