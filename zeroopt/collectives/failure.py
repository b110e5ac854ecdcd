"""How failed collectives are told: what was going on, for want of which rank, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

ADVICE = (
    "Every rank must run forward, backward and step equally often and in the same order: give all ranks the same number of "
    "batches, or train within model.join(), and let none skip a step or go on after an exception alone"
)
"""What to do about ranks that have diverged."""

_MAX_NAMED = 8


def describe_failure(what: str, missing: Sequence[int | None], reason: str, further_advice: str = "") -> str:
    """The message of a collective that has failed.

    Args:
        what: transport and collective.
        missing: ranks that it waited for; None stands for any.
        reason: the backend's own words, which say whether it was a timeout or a lost connection.
        further_advice: what else there is to do.
    """
    names = ", ".join("other ranks" if rank is None else f"rank {rank}" for rank in dict.fromkeys(missing))
    advice = f". Unless they are stopped or busy, the ranks have diverged. {ADVICE}" if is_timeout(reason) else ""
    advice += f". {further_advice}" if further_advice else ""
    return f"{what}: failed for want of {names}: {reason}{advice}"


def is_timeout(reason: str) -> bool:
    """Whether these are words of a backend for which the time has gone by."""
    return "timed out" in reason.lower() or "timeout" in reason.lower()


def name_ranks(ranks: Sequence[int]) -> str:
    """Ranks as messages name them: "rank 1", "ranks 0, 2", and of many the first ones."""
    shown = ", ".join(map(str, ranks[:_MAX_NAMED]))
    others = len(ranks) - _MAX_NAMED
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}{f' and {others} others' if others > 0 else ''}"


def the_other_rank(group: dist.ProcessGroup) -> int | None:
    """Whom a call that needs all ranks waits for, where there are two; None where it may be any of several."""
    return 1 - group.rank() if group.size() == 2 else None
