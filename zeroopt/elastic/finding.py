"""Which copies there are on all hosts, and the newest step of which all ranks' are whole."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from .place import FileName, check_private, files_in
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
        run: that began last, of all files that there are; those of others do not count. 0: there are no files.
        last_layout: of its files.
        has_earlier: there are files of earlier runs, too.
        to_fetch: files that some hosts lack: with the rank that brings each of them, and those that take it, one of each host.
        room: bytes of these, by the rank that takes them.
        lost: where there is nothing to go on from, because hosts were lost with what they held.
    """

    step: int | None = None
    names: list[FileName] = field(default_factory=list)
    run: int = 0
    last_layout: int = 0
    has_earlier: bool = False
    to_fetch: list[tuple[FileName, list[int]]] = field(default_factory=list)
    room: dict[int, int] = field(default_factory=dict)
    lost: Lost | None = None


def find(directory: Path) -> dict[FileName, OnHost]:
    """The files on this host. Raises OSError where one cannot be read, or others may have put it there."""
    check_private(directory)
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
    """The newest step that is whole, of the run that began last: a host that was away may come back with copies of one before, whose steps
    have the same numbers.

    Args:
        on_ranks: what each rank sees on its host.
        hosts: the ranks of each host, the first of which fetches and brings.
    """
    names = {name for found in on_ranks for name in found}
    run = max((name.run for name in names), default=0)
    of_run = {name for name in names if name.run == run}
    last = max((name.layout for name in of_run), default=0)
    nothing = Found(run=run, last_layout=last, has_earlier=len(of_run) < len(names))
    firsts = [host[0] for host in hosts]
    having = _having(on_ranks, firsts, of_run)
    whole = [
        one for one in having if all((replace(one[0], rank=rank), one[1]) in having for rank in range(one[0].ranks))
    ]
    if not whole:
        return replace(nothing, lost=_lost(of_run, max(having, key=_by_step, default=None)))
    newest, step = max(whole, key=_by_step)
    to_fetch, room = [], dict.fromkeys(firsts, 0)
    chosen = [replace(newest, rank=rank) for rank in range(newest.ranks)]
    for name in chosen:
        have = having[name, step]
        lack = [rank for rank in firsts if rank not in have]
        if lack:
            to_fetch.append((name, [have[0], *lack]))
        for rank in lack:
            room[rank] += on_ranks[have[0]][name].num_bytes
    return replace(nothing, step=step, names=chosen, to_fetch=to_fetch, room=room)


_Copy = tuple[FileName, int]
"""A file, and the step of a slot that is whole."""


def _by_step(copy: _Copy) -> tuple[int, int, int]:
    name, step = copy
    return step, name.layout, name.ranks


def _having(
    on_ranks: Sequence[dict[FileName, OnHost]], firsts: Sequence[int], names: set[FileName]
) -> dict[_Copy, list[int]]:
    """Which of the first ranks of hosts have copies in these files."""
    having: dict[_Copy, list[int]] = {}
    for rank in firsts:
        for name in names & on_ranks[rank].keys():
            for step in set(on_ranks[rank][name].steps) - {NOT_WHOLE}:
                having.setdefault((name, step), []).append(rank)
    return having


def _lost(names: Collection[FileName], newest: _Copy | None) -> Lost | None:
    """What there is nothing of, of all files of a run, beside the newest copy that is whole. All files of a layout are there before the
    first copy begins, and what is removed is of no step before."""
    if newest is None:
        return None
    name, step = newest
    missing = [rank for rank in range(name.ranks) if replace(name, rank=rank) not in names]
    return Lost(step, missing) if missing else None
