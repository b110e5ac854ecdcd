"""For want of whom something has failed: the rank that is lost, rather than one that has given up because of it.

A rank that fails for want of another one gives up its connections, so that the ranks at their other ends do not wait for it in vain. To
these it looks lost, too. So before it does that, it says for want of whom, in the store by which the process group was made, and who
finds a connection broken looks there:

    rank 2 dies ──▶ rank 1 finds its connection with 2 broken, says "2", gives up ──▶ rank 0 finds its connection with 1 broken,
                                                                                     reads "2", and names 2

What has been said stays said: a process group that has lost a rank has lost it for good. A group that is part of another one (`note_part`)
says and finds out all of it in that one, by whose numbers ranks are named: what one part lacks may have been lost in another.

    a message fails         the rank at the other end is suspected
    a collective fails      those are to which Gloo's connections are broken
    it has taken too long   all that do not say within seconds that they have failed, too
    ranks of one host       a `Witness` knows for certain whose process has ended
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread
from typing import Any, Protocol
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
import torch.distributed as dist

from ..errors import CollectiveError, ZeroOptError
from .failure import describe_failure, is_timeout
from .group_timeout import group_timeout

# All of it is done in a thread, and given up after so long besides what it waits for: with the rank that holds the store, the store may be lost.
_LIMIT_S = 5.0
# A suspect that has given up has mostly said so before; after a timeout, which breaks connections first, it may not have come to it.
_GRACE_S = 0.5
# After a timeout, all others that wait come to theirs. One that the machine lets wait just then is not to be named beside whom it has waited
# for: where ranks were given long, so are the answers.
_ROLL_CALL_PART = 1 / 60  # of the timeout
_LEAST_ROLL_CALL_S, _LONGEST_ROLL_CALL_S = 1.0, 10.0
_LOOK_S = 0.01

_TAG = (1 << 23) - 1  # of messages that nobody sends
_AT_ONCE = timedelta(milliseconds=1)

Suspects = Sequence[int | None]
"""Ranks of a group; None stands for any."""


class Witness(Protocol):
    """Knows which ranks of a group are dead."""

    def dead_ranks(self) -> set[int]:
        """Those whose process has ended, of all that it can tell of."""


_witnesses: WeakKeyDictionary[dist.ProcessGroup, WeakSet[Witness]] = WeakKeyDictionary()
_named: WeakKeyDictionary[dist.ProcessGroup, list[int]] = WeakKeyDictionary()
_connected: WeakKeyDictionary[dist.ProcessGroup, Sequence[int]] = WeakKeyDictionary()
# Of parts: the group that they are part of, and their ranks in it.
_wholes: WeakKeyDictionary[dist.ProcessGroup, tuple[ReferenceType[dist.ProcessGroup], Sequence[int]]] = (
    WeakKeyDictionary()
)

# Of groups that are made for another thread: that of the same ranks in which notes are left.
_firsts: WeakKeyDictionary[dist.ProcessGroup, ReferenceType[dist.ProcessGroup]] = WeakKeyDictionary()


def add_witness(group: dist.ProcessGroup, witness: Witness) -> None:
    """Ask the witness, as long as it lives, where something fails in the group."""
    _witnesses.setdefault(group, WeakSet()).add(witness)


def note_connected(group: dist.ProcessGroup, ranks: Sequence[int]) -> None:
    """In a group that does not connect each rank with each, this one is connected with these."""
    _connected[group] = ranks


def note_part(group: dist.ProcessGroup, whole: dist.ProcessGroup, ranks: Sequence[int]) -> None:
    """A group is part of another one, in which its ranks have these numbers."""
    _wholes[group] = ref(whole), ranks


def note_second(group: dist.ProcessGroup, first: dist.ProcessGroup) -> None:
    """A group has the same ranks as another one, in which they leave notes: a rank that has failed in one may be waited for in the other."""
    _firsts[group] = ref(first)


def name_of(group: dist.ProcessGroup, rank: int) -> int:
    """By which number messages name a rank of a group."""
    return _wholes[group][1][rank] if group in _wholes else rank


def break_off(group: dist.ProcessGroup) -> None:
    """Break this rank's connections by Gloo: whatever goes on in the group fails, here and on the ranks that wait for this one."""
    _Probes(group).break_off()


def name_lost(group: dist.ProcessGroup | None, suspects: Suspects, reason: str) -> Suspects:
    """The ranks that are lost, where something has failed for want of the suspects; and let the other ranks know. Not collective, and
    may take seconds. The suspects themselves where no more can be found out.

    This rank's connections by Gloo are broken then, so that others do not wait for it.

    Args:
        suspects: by their numbers in the group.
        group: None: of one that nobody knows. Of two ranks, it can only be the other one.
        reason: the backend's own words.
    """
    whole = None if group is None or group not in _wholes else _wholes[group][0]()
    if group is not None and whole is not None:
        return _name_lost_of_part(group, whole, suspects, reason)
    if group is None or group.size() <= 2:
        return suspects
    if group not in _named:
        found: list[list[int]] = []
        thread = Thread(target=lambda: found.append(_Inquiry(group, reason).lost(suspects)), daemon=True)
        thread.start()
        # Who comes just behind a roll call, and is suspected, holds one of its own.
        thread.join(_LIMIT_S + 2 * (roll_call_s(group) + _GRACE_S))
        if not found or not found[0]:
            return suspects
        _named[group] = found[0]
    return _named[group]


def _name_lost_of_part(group: dist.ProcessGroup, whole: dist.ProcessGroup, suspects: Suspects, reason: str) -> Suspects:
    """By the numbers of the whole. Those that wait for this rank in whatever part hear of it."""
    known = sorted(_dead_ranks(group)) or suspects
    lost = name_lost(whole, [None if rank is None else name_of(group, rank) for rank in known], reason)
    for part, (other, _) in list(_wholes.items()):
        if other() is whole:
            break_off(part)
    return lost


def roll_call_s(group: dist.ProcessGroup) -> float:
    """How long ranks of a group have, after a timeout, to say that they have failed, too."""
    part = group_timeout(group, torch.device("cpu")).total_seconds() * _ROLL_CALL_PART
    return min(max(part, _LEAST_ROLL_CALL_S), _LONGEST_ROLL_CALL_S)


def _dead_ranks(group: dist.ProcessGroup) -> set[int]:
    return set().union(*(witness.dead_ranks() for witness in _witnesses.get(group, ())))


@contextmanager
def named_failures(
    what: str, missing: int | None, further_advice: str = "", group: dist.ProcessGroup | None = None
) -> Iterator[None]:
    """Let calls of torch.distributed fail as transports do: with a CollectiveError that says what was going on.

    Args:
        missing: the rank that they wait for; None stands for any.
        further_advice: what else there is to do.
        group: in which they are made, where more can be found out.
    """
    try:
        yield
    except ZeroOptError:
        raise
    except RuntimeError as error:
        lost = name_lost(group, [missing], str(error))
        raise CollectiveError(describe_failure(what, lost, str(error), further_advice)) from error


class _Inquiry:
    """What one rank finds out after one failure."""

    def __init__(self, group: dist.ProcessGroup, reason: str) -> None:
        self._group = group
        self._rank = group.rank()
        self._others = [rank for rank in range(group.size()) if rank != self._rank]
        self._is_timeout = is_timeout(reason)
        self._has_called = False
        self._roll_call_s = roll_call_s(group)
        self._notes = _Notes(group)
        self._probes = _Probes(group)

    def lost(self, suspects: Suspects) -> list[int]:
        """The ranks that are lost, as far as can be found out; the others are told."""
        self._notes.say_here(self._rank)
        named = _dead_ranks(self._group) or self._follow(self._known(suspects))
        if named:
            self._notes.say(self._rank, sorted(named))
        self._probes.break_off()
        return sorted(named)

    def _known(self, suspects: Suspects) -> set[int]:
        known = {rank for rank in suspects if rank is not None}
        if len(known) == len(set(suspects)):
            return known
        return known | (self._silent() if self._is_timeout else self._probes.broken)

    def _silent(self) -> set[int]:
        """Who does not say that it has failed, too."""
        until = time.monotonic() + self._roll_call_s
        silent = set(self._others)
        while silent and time.monotonic() < until:
            silent -= self._here(silent)
            time.sleep(_LOOK_S)
        self._has_called = True
        return silent if len(silent) < len(self._others) else set()

    def _here(self, ranks: set[int]) -> set[int]:
        return {rank for rank in ranks if self._notes.is_here(rank)}

    def _follow(self, suspects: set[int]) -> set[int]:
        """Those for want of which the suspects have given up, and the suspects that have not said so.

        Behind a roll call, those that come late, while others do not come at all, are none: they wait for what this rank says.
        """
        until = time.monotonic() + _GRACE_S
        # Which takes those as long that have failed, and are finding out themselves.
        until_found = until + self._roll_call_s + _GRACE_S
        said: dict[int, list[int]] = {}
        unsaid = suspects
        while unsaid:
            said |= {rank: lost for rank in unsaid if (lost := self._notes.said(rank)) is not None}
            unsaid = suspects - said.keys()
            finding_out = self._here(unsaid)
            if self._has_called and finding_out < unsaid and time.monotonic() > until:
                unsaid = unsaid - finding_out
                break
            if time.monotonic() > (until_found if finding_out else until):
                break
            time.sleep(_LOOK_S)
        named = set().union(*said.values()) | unsaid
        # Who was late itself is lost to the others; for itself it is they that have given up.
        return named - {self._rank} or suspects


class _Probes:
    """Messages from each rank that nobody sends.

    Attributes:
        broken: the ranks to which this one's connections are broken: then a message cannot even be started.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.broken: set[int] = set()
        self._works: list[dist.Work] = []
        for rank in _connected.get(group, range(group.size())) if has_gloo(group) else ():
            if rank != group.rank():
                try:
                    self._works.append(group.recv([torch.empty(1, dtype=torch.uint8, device="cpu")], rank, _TAG))
                except RuntimeError:
                    self.broken.add(rank)

    def break_off(self) -> None:
        """Break all connections, as messages do that have not come in time."""
        for work in self._works:
            with suppress(RuntimeError):
                work.wait(_AT_ONCE)


class _Notes:
    """What ranks say of themselves in a process group's store. Where there is none, or it is lost, nobody says anything."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        group = (_firsts[group]() if group in _firsts else None) or group
        # After `destroy_process_group` there is none.
        self._store: Any = dist.distributed_c10d._world.pg_map.get(group, ("", None))[1]

    def say(self, rank: int, lost: Sequence[int]) -> None:
        """This rank has failed, for want of others."""
        self._write(f"lost/{rank}", json.dumps(lost))
        self.say_here(rank)

    def said(self, rank: int) -> list[int] | None:
        """For want of whom a rank has failed; None where it has not said so."""
        text = self._read(f"lost/{rank}")
        return None if text is None else list(json.loads(text))

    def say_here(self, rank: int) -> None:
        """This rank has failed."""
        self._write(f"here/{rank}", "")

    def is_here(self, rank: int) -> bool:
        """Whether a rank has failed and lives."""
        return self._read(f"here/{rank}") is not None

    def _write(self, name: str, text: str) -> None:
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set(f"zeroopt/{name}", text)

    def _read(self, name: str) -> bytes | None:
        if self._store is None:
            return None
        try:
            there = self._store.check([f"zeroopt/{name}"])
            return self._store.get(f"zeroopt/{name}") if there else None
        except RuntimeError:
            self._store = None
            return None


def has_gloo(group: dist.ProcessGroup) -> bool:
    """Whether a group sends CPU tensors through Gloo, which torch.distributed need not know any more."""
    try:
        return isinstance(group._get_backend(torch.device("cpu")), dist.ProcessGroupGloo)
    except (AttributeError, RuntimeError):  # torch may be built without it
        return False
