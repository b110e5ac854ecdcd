"""What was recorded on pretend devices: races, figures, and whether other orders give other numbers."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import _device

Kind = _device.Kind


@dataclass(frozen=True)
class Race:
    """Two nodes that touch the same bytes, one of them to write, and that nothing orders."""

    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.first}\n    and {self.second}"


@dataclass(frozen=True)
class Figures:
    """What one device, or all of them, have been told to do.

    Attributes:
        launches: kernels, by name.
        host_waits: by what the host has waited for, and where.
        uploads: copies from the host to the device.
        collectives: by name.
    """

    launches: Counter[str]
    host_waits: Counter[str]
    uploads: int
    collectives: Counter[str]


class Recording:
    """The nodes between `begin` and `end`. There is one recording at a time."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.actors: list[str] = []

    def begin(self) -> None:
        _device.begin()

    def end(self) -> None:
        _device.end()
        self.nodes, self.actors = _device.nodes(), _device.actors()

    def abandon(self) -> None:
        """Where an error has come in between."""
        if _device.is_on():
            self.end()

    def races(self) -> Counter[Race]:
        """All pairs of accesses that the device would be free to exchange."""
        found: Counter[Race] = Counter()
        history = _History()
        for node in self.nodes:
            for access in node.ranges:
                for other in history.conflicts(node, access):
                    found[Race(self._describe(other), self._describe(node))] += 1
        return found

    def wrong_orders(self, seeds: Sequence[int]) -> dict[int, list[str]]:
        """Of these seeds those whose orders give other bits, and what is wrong then. Nothing may have been recorded since."""
        replay = _device.Replay()
        wrong = {}
        for seed in seeds:
            differences = replay.run(seed)
            if differences:
                wrong[seed] = differences
        return wrong

    def figures(self, device: int | None = None) -> Figures:
        """Of a device, or of all."""
        suffix = "" if device is None else f"cuda:{device}"
        nodes = [node for node in self.nodes if self.actors[node.actor].endswith(suffix)]
        of_host = [node for node in nodes if node.kind == Kind.HOST_WAIT]
        copies = [node for node in nodes if node.kind == Kind.COPY and "to the device" in node.name]
        collectives = [node for node in self.nodes if node.kind == Kind.COLLECTIVE]
        return Figures(
            launches=Counter(node.name for node in nodes if node.kind == Kind.LAUNCH),
            host_waits=Counter(f"{node.name} at {node.where}" for node in of_host),
            uploads=len(copies),
            collectives=Counter(node.name.split(" of ")[0] for node in collectives),
        )

    def _describe(self, node: Any) -> str:
        return f"{node.name} on {self.actors[node.actor]} at {node.where}"


class _History:
    """Who has touched which bytes last, in pieces between which nobody makes a difference.

    For each piece the last write, and the reads since. A node that has come after these has come after all before them, if
    those have been free of races.
    """

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._pieces: dict[int, tuple[int, Any, list[Any]]] = {}  # by begin: end, last write, reads since

    def conflicts(self, node: Any, access: Any) -> list[Any]:
        """Nodes that have touched some of these bytes and are not ordered with this one, which is noted."""
        found: dict[int, Any] = {}
        for begin in self._cut(access.begin, access.end):
            end, write, reads = self._pieces[begin]
            if write is not None and not _is_before(write, node):
                found[id(write)] = write
            if access.is_write:
                found.update((id(read), read) for read in reads if not _is_before(read, node))
                self._pieces[begin] = end, node, []
            else:
                kept = [read for read in reads if not _is_before(read, node)]
                self._pieces[begin] = end, write, [*kept, node]
        return list(found.values())

    def _cut(self, begin: int, end: int) -> list[int]:
        """Begins of the pieces that make up a range."""
        self._split(begin)
        self._split(end)
        first = bisect.bisect_left(self._begins, begin)
        result, at = [], begin
        for piece in self._begins[first : bisect.bisect_left(self._begins, end)]:
            if at < piece:
                result.append(self._add(at, piece))
            result.append(piece)
            at = self._pieces[piece][0]
        if at < end:
            result.append(self._add(at, end))
        return result

    def _split(self, at: int) -> None:
        place = bisect.bisect_left(self._begins, at) - 1
        if place < 0:
            return
        begin = self._begins[place]
        end, write, reads = self._pieces[begin]
        if begin < at < end:
            self._pieces[begin] = at, write, reads
            self._add(at, end, write, reads)

    def _add(self, begin: int, end: int, write: Any = None, reads: Sequence[Any] = ()) -> int:
        bisect.insort(self._begins, begin)
        self._pieces[begin] = end, write, list(reads)
        return begin


def _is_before(first: Any, second: Any) -> bool:
    """Whether a node is through before another begins, in every order."""
    actor = first.actor
    clock = second.clock
    return first is second or (actor < len(clock) and first.clock[actor] <= clock[actor])
