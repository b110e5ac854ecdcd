"""A collective on its way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from .collectives import CALLER, Phase
from .events import Process, Resource, Signal


class Travelling:
    """Goes through its phases by itself, up to those for which the rank's own thread has to ask.

    Attributes:
        is_through: when all of them are.

    Args:
        take: is told the processor time that libraries take.
    """

    def __init__(
        self, phases: Sequence[Phase], resources: Mapping[str, Resource], take: Callable[[float], None]
    ) -> None:
        self.is_through = Signal()
        self._left = deque(phases)
        self._resources = resources
        self._take = take
        self._on_its_way: Signal | None = None
        self._go_on()

    def _go_on(self) -> None:
        self._on_its_way = None
        if not self._left:
            self.is_through.fire()
        elif self._left[0].where != CALLER:
            phase = self._left.popleft()
            self._take(phase.processor_s)
            self._on_its_way = self._resources[phase.where].hold(phase.seconds, phase.latency, alone=phase.alone)
            self._on_its_way.then(self._go_on)

    @property
    def asks(self) -> bool:
        """Whether it waits for the caller."""
        return self._on_its_way is None and bool(self._left)

    def progress(self) -> Process:
        """What the caller can do for it now."""
        while self.asks:
            yield self._left.popleft().seconds
            self._go_on()

    def finish(self) -> Process:
        """Until it is through."""
        while not self.is_through.has_fired:
            yield from self.progress()
            if self._on_its_way is not None:
                yield self._on_its_way
