"""The part of a parameter that this rank steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..plan.params import ManagedParam, ParamState


@dataclass(eq=False)
class Segment:
    """The part of a parameter that this rank steps.

    Attributes:
        start: first element of the parameter that is in the segment.
        offset: first element of the own range of the bucket that is in the segment.
        shard: the leaf that an optimizer steps: a part of the flat parameters, or of their float32 master. 1-D, or in the
            parameter's own shape (and memory format) where that is whole.
        state_dtype: of the state that an optimizer keeps for it, unless a fused kernel stores it otherwise.
    """

    owner: ManagedParam
    start: int
    offset: int
    numel: int
    shard: nn.Parameter
    state_dtype: torch.dtype

    @property
    def range(self) -> tuple[int, int]:
        """First and last element, plus one, of the own range of the bucket that are in the segment."""
        return self.offset, self.offset + self.numel

    def part_of(self, own: Tensor) -> Tensor:
        """Its elements of an array over the own range, 1-D, a view."""
        return own[self.offset : self.offset + self.numel]

    def view_in(self, own: Tensor) -> Tensor:
        """Its elements of an array over the own range, in the shape of the shard, a view."""
        return view_of(own, self.owner, self.offset, self.numel)

    def flatten(self, values: Tensor) -> Tensor:
        """Values in the shape of the shard as they lie in the own range, 1-D."""
        return self.owner.flatten(values) if self.owner.is_whole else values


class BySegments(Protocol):
    """What has arrays with an element for each of a segment's. They move with the segments when buckets are planned anew."""

    def arrays(self, segment: Segment) -> ParamState:
        """What there is of a segment, by name, live; other values may be among it, which all ranks have alike."""

    def forget(self, segment: Segment) -> None:
        """It is being moved to where the segment will be: keep it no longer, if it has memory of its own."""

    def let_go(self) -> None:
        """All that was to be forgotten has been moved: memory that nobody else reads may go."""

    def take(self, segment: Segment, arrays: ParamState) -> None:
        """Let what has been moved be what there is of a segment."""


def view_of(own: Tensor, owner: ManagedParam, offset: int, numel: int) -> Tensor:
    """Elements of an array over the own range: those of a whole parameter in its shape and memory format, others 1-D."""
    if owner.is_whole:
        return own.as_strided(owner.shape, owner.stride, own.storage_offset() + offset)
    return own[offset : offset + numel]
