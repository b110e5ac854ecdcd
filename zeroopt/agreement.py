"""All ranks have to wrap the same thing. They compare what they have before anything is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist

from .errors import RankMismatchError


def agree(group: dist.ProcessGroup, device: torch.device, lines: Sequence[str], problem: Exception | None) -> None:
    """Return when every rank called with the same lines and without a problem; else raise on every rank.

    Collective: every rank of the group must call it. Usually it costs one small all-reduce; the lines themselves travel
    only when they differ.

    Args:
        lines: the description of what this rank is about to wrap, in an order that all ranks share.
        problem: what is wrong on this rank alone, if anything is.

    Raises:
        Exception: this rank's own problem, as it is.
        RankMismatchError: another rank has a problem, or the first difference between two ranks; the same text everywhere.
    """
    if not _differs(group, device, lines, problem):
        return
    everyone: list[tuple[list[str], str | None]] = [([], None)] * group.size()
    mine = (list(lines), None if problem is None else str(problem))
    dist.all_gather_object(everyone, mine, group=group)
    if problem is not None:
        raise problem
    raise RankMismatchError(_first_difference(everyone))


def agreement_device(group: dist.ProcessGroup) -> torch.device:
    """Where small tensors lie that ranks of the group compare."""
    return torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")


def _differs(group: dist.ProcessGroup, device: torch.device, lines: Sequence[str], problem: Exception | None) -> bool:
    """Whether any rank has other lines or a problem: the largest and the smallest digest over all ranks differ."""
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    words = [int.from_bytes(digest[i : i + 6], "big") for i in range(0, 30, 6)]  # positive in 64 bits
    flag = 0 if problem is None else 1
    message = torch.tensor([*words, *(-w for w in words), flag], dtype=torch.int64, device=device)
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=group)
    values = message.tolist()
    largest, smallest = values[: len(words)], [-v for v in values[len(words) : -1]]
    return largest != smallest or values[-1] != 0


def _first_difference(everyone: Sequence[tuple[list[str], str | None]]) -> str:
    for rank, (_, problem) in enumerate(everyone):
        if problem is not None:
            return f"zeroopt.wrap failed on rank {rank}: {problem}"
    reference = everyone[0][0]
    for rank, (lines, _) in enumerate(everyone):
        for here, there in zip_longest(reference, lines, fillvalue="nothing more"):
            if here != there:
                return (
                    f"zeroopt.wrap got different things on different ranks; the first difference: rank 0 has [{here}], "
                    f"rank {rank} has [{there}]. Build the same model and optimizer, with the same options, on all ranks"
                )
    raise AssertionError("the digests of equal descriptions differ")
