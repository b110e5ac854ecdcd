"""All ranks do their part, rank 0 puts the parts together, and each rank has its own back; or all of them fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch.distributed as dist

from ...collectives import ControlGroup
from ...collectives.control import lone_control
from ...errors import CheckpointError, ZeroOptError

T = TypeVar("T")
R = TypeVar("R")

_SHOWN_RANKS = 3
_ADVICE = (
    "Checkpoints are saved and loaded by every rank of the process group: let all of them call it, not rank 0 alone"
)


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What a rank sends: a value, or the text of a failure, for not every exception can be sent."""

    values: tuple[T, ...] = ()
    failure: str | None = None


def together(
    group: dist.ProcessGroup | None, what: str, work: Callable[[], T], combine: Callable[[list[T]], Sequence[R]]
) -> R:
    """Call `work` on each rank, `combine` on rank 0 with the values of all ranks, and return what that has for this rank.

    Collective in the group; without one, of this process alone. No rank waits for one that has failed.

    Args:
        what: is done, for messages.
        combine: takes one value a rank, and gives one value a rank. Not called when `work` has failed anywhere.

    Raises:
        CheckpointError: `work` failed on some rank, or `combine` on rank 0; the same text on every rank.
        CollectiveError: a rank is gone, or does not answer.
        BaseException: what came from outside, such as a KeyboardInterrupt, on the rank where it came.
    """
    control = lone_control() if group is None else ControlGroup(group, advice=_ADVICE)
    mine, error = _attempt(work)
    everyone = control.collect(mine, 0, what)
    answers: list[_Outcome[R]] | None = None
    if everyone is not None:
        answers, combining_error = _combined(everyone, what, combine)
        error = error or combining_error
    answer = control.hand_out(answers, 0, what)
    if error is not None and not isinstance(error, Exception):
        raise error
    if answer.failure is not None:
        raise CheckpointError(answer.failure) from error
    return answer.values[0]


def _attempt(work: Callable[[], T]) -> tuple[_Outcome[T], BaseException | None]:
    try:
        return _Outcome((work(),)), None
    except BaseException as error:  # noqa: BLE001  the other ranks have to hear of an interrupt too
        text = str(error) if isinstance(error, (ZeroOptError, OSError)) else f"{type(error).__name__}: {error}"
        return _Outcome(failure=text), error


def _combined(
    everyone: Sequence[_Outcome[T]], what: str, combine: Callable[[list[T]], Sequence[R]]
) -> tuple[list[_Outcome[R]], BaseException | None]:
    failures = {rank: outcome.failure for rank, outcome in enumerate(everyone) if outcome.failure is not None}
    if not failures:
        combined, error = _attempt(lambda: combine([value for outcome in everyone for value in outcome.values]))
        if combined.failure is None:
            return [_Outcome((value,)) for value in combined.values[0]], None
        failures[0] = combined.failure
    else:
        error = None
    return [_Outcome(failure=_describe(what, failures))] * len(everyone), error


def _describe(what: str, failures: Mapping[int, str]) -> str:
    shown = "; ".join(f"on rank {rank}: {text}" for rank, text in list(failures.items())[:_SHOWN_RANKS])
    more = len(failures) - _SHOWN_RANKS
    return f"{what} failed {shown}" + (f"; and on {more} more ranks" if more > 0 else "")
