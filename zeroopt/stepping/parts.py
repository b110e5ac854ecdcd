"""Parameters that an optimizer steps part by part, each part as a parameter of its own: fused q, k and v, or heads.

State stays in one entry, that of the parameter: for the time of a step each part has its piece of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..storage.segment import Segment
from .part_state import PartState, parts_of

Leaves = Mapping[Segment, Sequence[nn.Parameter]]
"""What an optimizer steps of each segment: its shard, or the parts of that."""


@contextmanager
def in_parts(optimizer: torch.optim.Optimizer, segments: Sequence[Segment]) -> Iterator[Leaves]:
    """Within it, the optimizer has the state of the parts in place of that of the parameters that consist of some."""
    parts = [_Parts(optimizer, segment) for segment in segments if segment.owner.is_stepped_in_parts]
    leaves: dict[Segment, Sequence[nn.Parameter]] = {segment: (segment.shard,) for segment in segments}
    leaves.update((one.segment, one.leaves) for one in parts)
    try:
        yield leaves
    finally:
        for one in parts:
            one.join()


class _Parts:
    """The parts of one segment."""

    def __init__(self, optimizer: torch.optim.Optimizer, segment: Segment) -> None:
        self.segment = segment
        self.leaves = [nn.Parameter(part) for part in parts_of(segment.owner, segment.shard.data)]
        self._state = optimizer.state
        self._whole = PartState(segment.owner)
        entries = self._whole.cut(self._state.pop(segment.shard, {}))
        self._state.update((leaf, entry) for leaf, entry in zip(self.leaves, entries, strict=True) if entry)

    def join(self) -> None:
        """Let the state be the whole parameter's again; of one that has been left alone there is none."""
        joined = self._whole.join([self._state.pop(leaf, {}) for leaf in self.leaves])
        if joined:
            self._state[self.segment.shard] = joined
