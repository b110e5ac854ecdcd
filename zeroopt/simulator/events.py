"""What happens when, and who waits for whom.

    clock = Clock()
    link = Resource(clock)

    def rank():
        sent = link.hold(2.0)   # goes on beside what follows
        yield 1.0               # computes for a second
        yield sent              # waits until it is through

    clock.start(rank())
    clock.run()                 # clock.now == 2.0

A process is a generator that yields seconds to let pass, or a `Signal` to wait for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from itertools import count
from typing import TypeAlias


class Signal:
    """Something that comes to pass once.

    Attributes:
        has_fired: whether it has.
    """

    def __init__(self) -> None:
        self.has_fired = False
        self._waiting: list[Callable[[], None]] = []

    def fire(self) -> None:
        self.has_fired = True
        waiting, self._waiting = self._waiting, []
        for go_on in waiting:
            go_on()

    def then(self, go_on: Callable[[], None]) -> None:
        """Call a function when it has come to pass: now, if it has."""
        if self.has_fired:
            go_on()
        else:
            self._waiting.append(go_on)


Process: TypeAlias = Generator["float | Signal", None, None]


class Clock:
    """Time, which goes from one event to the next.

    Attributes:
        now: seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()  # of two events at one time, the first to be asked for comes first

    def at(self, time: float, happen: Callable[[], None]) -> None:
        """Call a function at some time, which has not gone by."""
        assert time >= self.now
        heapq.heappush(self._events, (time, next(self._numbers), happen))

    def start(self, process: Process) -> Signal:
        """Begin a process, as soon as the clock runs. Returns its end."""
        ended = Signal()

        def go_on() -> None:
            try:
                waits_for = next(process)
            except StopIteration:
                ended.fire()
                return
            if isinstance(waits_for, Signal):
                waits_for.then(go_on)
            else:
                self.at(self.now + waits_for, go_on)

        self.at(self.now, go_on)
        return ended

    def run(self) -> None:
        """Until nothing happens any more."""
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()


class Resource:
    """Serves one after the other, in the order in which they ask.

    Attributes:
        busy_s: for how long it has been asked.
    """

    def __init__(self, clock: Clock) -> None:
        self.busy_s = 0.0
        self._clock = clock
        self._is_free_at = 0.0

    def hold(self, seconds: float, then_s: float = 0.0, *, alone: bool = False) -> Signal:
        """Use it for some time, as soon as it is free. Returns the end of that, and of `then_s` more seconds, in which it serves others unless
        this one wants to be `alone`."""
        done = Signal()
        self.busy_s += seconds
        served = max(self._clock.now, self._is_free_at) + seconds
        self._is_free_at = served + then_s if alone else served
        self._clock.at(served + then_s, done.fire)
        return done
