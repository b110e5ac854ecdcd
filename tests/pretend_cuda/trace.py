"""What was recorded on pretend devices: races, figures, and whether other orders give other numbers."""

from __future__ import annotations

import bisect
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
        launches: calls that launch, by name; a kernel of zeroopt's may be launched in two or three parts.
        host_waits: by what the host has waited for, and where.
        uploads: copies from the host to the device.
        collectives: by name.
        peak_bytes: what memory was taken at most beyond that at the beginning; None for all devices together.
    """

    launches: Counter[str]
    host_waits: Counter[str]
    uploads: int
    collectives: Counter[str]
    peak_bytes: int | None


class Recording:
    """The nodes between `begin` and `end`. There is one recording at a time."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.actors: list[str] = []
        self._peaks: list[int] = []  # by device

    def begin(self) -> None:
        _device.begin()
        devices = range(_device.NUM_DEVICES)
        self._held = [_device.live_bytes(device) for device in devices]
        for device in devices:
            _device.reset_peak(device)

    def end(self) -> None:
        _device.end()
        self._peaks = [_device.peak_bytes(device) - held for device, held in enumerate(self._held)]
        self.nodes, self.actors = _device.nodes(), _device.actors()

    def abandon(self) -> None:
        """Where an error has come in between."""
        if _device.is_on():
            self.end()

    def races(self, left_out: Collection[int] = ()) -> Counter[Race]:
        """All pairs of accesses that the device would be free to exchange.

        Args:
            left_out: nodes, by their place, that wait for nothing, as if the program had forgotten it.
        """
        found: Counter[Race] = Counter()
        history = _History()
        for number, clock in enumerate(self._clocks(left_out)):
            node = _Timed(self.nodes[number], clock)
            for access in node.ranges:
                for other in history.conflicts(node, access):
                    found[Race(self._describe(other), self._describe(node))] += 1
        return found

    def wrong_orders(self, seeds: Iterable[int], left_out: Collection[int] = ()) -> dict[int, list[str]]:
        """Of these seeds those whose orders give other bits, and what is wrong then. Nothing may have been recorded since."""
        with _replaying(left_out) as run:
            differences = {seed: run(seed) for seed in seeds}
        return {seed: wrong for seed, wrong in differences.items() if wrong}

    def has_wrong_order(self, seeds: Iterable[int], left_out: Collection[int] = ()) -> bool:
        """Whether `wrong_orders` would find any: tries no more than the first."""
        with _replaying(left_out) as run:
            return any(run(seed) for seed in seeds)

    def at_once(self) -> Counter[Race]:
        """All pairs of collectives of two communicators that a device would be free to run at the same time. NCCL's guide advises against it:
        each may hold what the other needs to begin on another rank."""
        found: Counter[Race] = Counter()
        collectives = [
            (_Timed(node, clock), {_device.device_of(access.begin) for access in node.ranges})
            for node, clock in zip(self.nodes, self._clocks(()), strict=True)
            if node.kind == Kind.COLLECTIVE
        ]
        for (first, devices), (second, others) in itertools.combinations(collectives, 2):
            if first.actor != second.actor and devices & others and not first.is_before(second):
                found[Race(self._describe(first), self._describe(second))] += 1
        return found

    def waits(self) -> dict[str, list[int]]:
        """The nodes by which streams, or the host, wait: by the lines that make them wait."""
        places: dict[str, list[int]] = {}
        for number, node in enumerate(self.nodes):
            if node.kind in (Kind.WAIT, Kind.HOST_WAIT, Kind.HOST_QUERY) and node.after:
                places.setdefault(f"{node.name} at {node.where}", []).append(number)
        return places

    def waits_by(self, files: Collection[str]) -> dict[str, list[int]]:
        """Those waits for which a file of the package has called: by the lines from there on, with that file's first.

        Args:
            files: their paths, as `zeroopt/...py`. What was recorded has to be `showing` lines enough.
        """
        places: dict[str, list[int]] = {}
        for place, numbers in self.waits().items():
            lines = place.split(" at ", 1)[1].split(" < ")
            called_by = next((i for i, line in enumerate(lines) if line.startswith(tuple(files))), None)
            if called_by is not None:
                places.setdefault(" > ".join(reversed(lines[: called_by + 1])), []).extend(numbers)
        return places

    def _clocks(self, left_out: Collection[int]) -> Iterator[list[int]]:
        """For each node how many nodes of each actor are through when it is: a vector clock (Fidge and Mattern, 1988)."""
        of_actor = [[0] * len(self.actors) for _ in self.actors]
        clocks: list[list[int]] = []
        for number, node in enumerate(self.nodes):
            clock = of_actor[node.actor]
            before = [] if number in left_out else list(node.after)
            if node.launched_after >= 0:
                before.append(node.launched_after)
            if before:
                clock = list(map(max, clock, *(clocks[other] for other in before)))
            else:
                clock = list(clock)
            clock[node.actor] += 1
            of_actor[node.actor] = clock
            clocks.append(clock)
            yield clock

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
            peak_bytes=None if device is None else self._peaks[device],
        )

    def _describe(self, node: Any) -> str:
        return f"{node.name} on {self.actors[node.actor]} at {node.where}"


@contextmanager
def showing(lines: int) -> Iterator[None]:
    """Within it, so many lines of the package are told of what is recorded, the innermost ones."""
    _device.set_shown_lines(lines)
    try:
        yield
    finally:
        _device.set_shown_lines(3)


@contextmanager
def _replaying(left_out: Collection[int]) -> Iterator[Callable[[int], list[str]]]:
    """What runs the nodes in the order of a seed."""
    replay = _device.Replay(set(left_out))
    gc.collect()  # what is freed is overwritten, which is no part of the recording
    gc.disable()
    try:
        yield replay.run
    finally:
        gc.enable()


class _Timed:
    """A node and its clock."""

    __slots__ = ("actor", "clock", "name", "ranges", "where")

    def __init__(self, node: Any, clock: list[int]) -> None:
        self.actor, self.name, self.where, self.ranges = node.actor, node.name, node.where, node.ranges
        self.clock = clock

    def is_before(self, other: _Timed) -> bool:
        """Whether it is through before another begins, in every order."""
        return self is other or self.clock[self.actor] <= other.clock[self.actor]


class _History:
    """Who has touched which bytes last, in pieces between which nobody makes a difference.

    For each piece the last write, and the reads since. A node that has come after these has come after all before them, if
    those have been free of races.
    """

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._pieces: dict[int, tuple[int, _Timed | None, list[_Timed]]] = {}  # by begin: end, last write, reads since

    def conflicts(self, node: _Timed, access: Any) -> list[_Timed]:
        """Nodes that have touched some of these bytes and are not ordered with this one, which is noted."""
        found: dict[int, _Timed] = {}
        for begin in self._cut(access.begin, access.end):
            end, write, reads = self._pieces[begin]
            if write is not None and not write.is_before(node):
                found[id(write)] = write
            if access.is_write:
                found.update((id(read), read) for read in reads if not read.is_before(node))
                self._pieces[begin] = end, node, []
            else:
                kept = [read for read in reads if not read.is_before(node)]
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

    def _add(self, begin: int, end: int, write: _Timed | None = None, reads: Sequence[_Timed] = ()) -> int:
        bisect.insort(self._begins, begin)
        self._pieces[begin] = end, write, list(reads)
        return begin
