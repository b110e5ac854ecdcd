"""Which copies there are on all hosts, and the newest step of which all ranks' are whole."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .place import FileName, files_in
from .slots import NOT_WHOLE, Slots


class OnHost(NamedTuple):
    """A file on a host. steps: of which its slots are. num_bytes: of a file with one of them."""

    steps: tuple[int, int]
    num_bytes: int


class Lost(NamedTuple):
    """Whole copies of a step of some ranks, and of others, `ranks`, there is nothing on any host."""

    step: int
    ranks: list[int]


@dataclass(frozen=True)
class Found:
    """What to go on from.

    Attributes:
        step: the newest of which all ranks' copies are whole; None: there is none.
        names: their files, by rank.
        last_layout: of all files that there are.
        to_fetch: files that some hosts lack: with the rank that brings each of them, and those that take it, one of each host.
        room: bytes of these, by the rank that takes them.
        lost: where there is nothing to go on from, because hosts were lost with what they held.
    """

    step: int | None = None
    names: list[FileName] = field(default_factory=list)
    last_layout: int = 0
    to_fetch: list[tuple[FileName, list[int]]] = field(default_factory=list)
    room: dict[int, int] = field(default_factory=dict)
    lost: Lost | None = None


def find(directory: Path) -> dict[FileName, OnHost]:
    """The files on this host. Raises OSError where one cannot be read."""
    found = {}
    for name in files_in(directory):
        slots = Slots.open(directory / str(name))
        found[name] = OnHost(slots.steps, slots.bytes_with_one)
    return found


def forget_all_but(directory: Path, names: Collection[FileName]) -> None:
    """Let the other files in a directory have a copy of no step. Raises OSError where one cannot be read."""
    for name in set(files_in(directory)).difference(names):
        Slots.open(directory / str(name)).forget()


def choose(on_ranks: Sequence[dict[FileName, OnHost]], hosts: Sequence[Sequence[int]]) -> Found:
    """The newest step that is whole.

    Args:
        on_ranks: what each rank sees on its host.
        hosts: the ranks of each host, the first of which fetches and brings.
    """
    firsts = [host[0] for host in hosts]
    having: dict[tuple[FileName, int], list[int]] = {}
    for rank in firsts:
        for name, file in on_ranks[rank].items():
            for step in set(file.steps) - {NOT_WHOLE}:
                having.setdefault((name, step), []).append(rank)
    last = max((name.layout for found in on_ranks for name in found), default=0)
    best: tuple[int, int, int] | None = None
    for name, step in having:
        if all((FileName(name.layout, name.ranks, rank), step) in having for rank in range(name.ranks)):
            best = max(best or (step, 0, 0), (step, name.layout, name.ranks))
    if best is None:
        return Found(last_layout=last, lost=_lost(on_ranks, max(having, key=lambda one: one[1], default=None)))
    step, layout, ranks = best
    names = [FileName(layout, ranks, rank) for rank in range(ranks)]
    to_fetch, room = [], dict.fromkeys(firsts, 0)
    for name in names:
        have = having[name, step]
        lack = [rank for rank in firsts if rank not in have]
        if lack:
            to_fetch.append((name, [have[0], *lack]))
        for rank in lack:
            room[rank] += on_ranks[have[0]][name].num_bytes
    return Found(step, names, last, to_fetch, room)


def _lost(on_ranks: Sequence[dict[FileName, OnHost]], newest: tuple[FileName, int] | None) -> Lost | None:
    """What there is nothing of beside the newest copy that is whole. All files of a layout are there before the first copy begins, and what
    is removed is of no step before."""
    if newest is None:
        return None
    name, step = newest
    there = {name for found in on_ranks for name in found}
    missing = [rank for rank in range(name.ranks) if FileName(name.layout, name.ranks, rank) not in there]
    return Lost(step, missing) if missing else None
