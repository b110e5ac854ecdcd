"""What different ranks know of numbered things, put together. Things that are known alike travel once, however many ranks know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from .control import ControlGroup

T = TypeVar("T")


def merge(
    mine: Mapping[int, T], count: int, digest: Callable[[T], int], control: ControlGroup, what: str
) -> dict[int, T]:
    """What any rank knows of things that are numbered from 0 on. Collective.

    It takes two all-reduces of a number a thing; what some rank does not know of is told by the first one that does, which is pickled.
    So it does not grow with the number of ranks.

    Args:
        mine: what this rank knows, by number. Where ranks know different things under one number, one of them counts for all.
        count: of numbers.
        digest: from 1 to 2**62, of what is known; the same for what is alike.
        what: is going on, for messages.

    Returns:
        By number. What is alike is one object.
    """
    digests = {number: digest(one) for number, one in mine.items()}
    known = {digests[number]: one for number, one in mine.items()}
    told = torch.tensor([digests.get(number, 0) for number in range(count)], dtype=torch.int64, device=control.device)
    of_number: list[int] = control.largest(told, what).tolist()
    kinds = sorted({*of_number} - {0})
    if not kinds:
        return {}
    # Whether some rank lacks each, and the first rank that has it.
    asked = [(kind not in known, control.size - control.rank if kind in known else 0) for kind in kinds]
    answers = control.largest(torch.tensor(asked, dtype=torch.int64, device=control.device), what).tolist()
    lacking: dict[int, list[int]] = {}
    for kind, (is_lacking, place) in zip(kinds, answers, strict=True):
        if is_lacking:
            lacking.setdefault(control.size - place, []).append(kind)
    for source, theirs in sorted(lacking.items()):
        values = [known[kind] for kind in theirs] if control.rank == source else []
        known.update(zip(theirs, control.tell(values, source, what), strict=True))
    return {number: known[kind] for number, kind in enumerate(of_number) if kind}
