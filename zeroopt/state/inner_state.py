"""The state that the wrapped optimizer keeps for this rank's segments, as something that moves with them."""

from __future__ import annotations

from collections.abc import MutableMapping

from torch import Tensor

from ..plan.params import ParamState
from ..stepping.step_counts import with_exact_counts
from ..storage.segment import Segment


class InnerState:
    """A `BySegments` over the `state` of the wrapped optimizer."""

    def __init__(self, state: MutableMapping[Tensor, ParamState]) -> None:
        self._state = state

    def arrays(self, segment: Segment) -> ParamState:
        """Its entry; an empty one where it has none."""
        return with_exact_counts({segment: self._state.get(segment.shard, {})})[segment]

    def forget(self, segment: Segment) -> None:
        """Take the entry out."""
        self._state.pop(segment.shard, None)

    def let_go(self) -> None:
        """Entries that were taken out go by themselves."""

    def take(self, segment: Segment, arrays: ParamState) -> None:
        """Put an entry in."""
        self._state[segment.shard] = arrays
