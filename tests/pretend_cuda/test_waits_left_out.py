"""Every wait of a stream is needed: with one left out, some training loop has a race, or other bits in some order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from zeroopt.collectives.comm_stream import CommStream, StreamCollective
from zeroopt.gradients.reducer import GradientReducer
from zeroopt.parameters.gathers import ParamGathers
from zeroopt.streams import Mark

from .process import PretendProcess
from .test_streams import train

pytestmark = pytest.mark.slow

SHARED = 0.00105  # MiB: one of the buckets has layers of both branches, and not that before them


@dataclass(frozen=True)
class Loop:
    """A loop of `test_streams`."""

    step: str
    stage: int = 2
    accumulate: int = 1
    bucket_mb: float = 0.0005
    bucket_buffers: int = 2

    @property
    def case(self) -> tuple[str, dict[str, Any], int]:
        options = {"stage": self.stage, "bucket_mb": self.bucket_mb, "bucket_buffers": self.bucket_buffers}
        return self.step, {**options, "transport": "all_to_all"}, self.accumulate


def nothing(*_: Any, **__: Any) -> None:
    """In the place of what lets a stream wait."""


def forgetting(where: type, name: str, attribute: str, value: Callable[[], Any]) -> Any:
    """A method that leaves an attribute as if it had never been noted."""
    method = getattr(where, name)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        setattr(self, attribute, value())
        return result

    return patch.object(where, name, run)


class Unmarked(dict[Any, Any]):
    """Takes nothing."""

    def __setitem__(self, key: Any, value: Any) -> None: ...


def current_stream_alone() -> Any:
    """Who finishes a collective waits, and not who started it."""
    return patch.object(Mark, "wait", lambda mark, *_, wait=Mark.wait: wait(mark))


FAULTS: dict[str, tuple[Callable[[], Any], Loop]] = {
    "a collective does not wait for what fills its tensors": (
        lambda: patch.object(CommStream, "fall_in", nothing),
        Loop("in_one_stream"),
    ),
    "nobody waits for a collective": (
        lambda: patch.object(StreamCollective, "finish", nothing),
        Loop("in_one_stream"),
    ),
    "the stream of the step does not wait for gathers": (current_stream_alone, Loop("average_before_reading")),
    "a second branch does not wait for the gather that the first has waited for": (
        lambda: forgetting(ParamGathers, "attach", "arrived", Unmarked),
        Loop("in_one_stream", bucket_mb=SHARED),
    ),
    "who uses sums does not wait for who has waited for them": (
        lambda: forgetting(GradientReducer, "finish", "_finished", lambda: None),
        Loop("step_on_another"),
    ),
}


def _record(name: str | None, loop: Loop) -> tuple[list[str], list[int]]:
    """Races, and seeds of orders with other bits."""
    from .ranks import Rank, on_ranks
    from .surface import host_is_ahead

    def run(rank: Rank) -> list[Tensor]:
        return train(*loop.case, rank.number, rank.device, rank.recorded)

    def look() -> tuple[list[str], list[int]]:
        with host_is_ahead():
            _, recording = on_ranks(2, run)
        return [str(race) for race in recording.races()], list(recording.wrong_orders(range(10)))

    if name is None:
        return look()
    with FAULTS[name][0]():
        return look()


@pytest.mark.parametrize("name", FAULTS)
def test_a_wait_that_is_left_out_is_found(name: str, on_pretend_cuda: PretendProcess) -> None:
    loop = FAULTS[name][1]
    assert on_pretend_cuda(_record, None, loop) == ([], [])
    races, orders = on_pretend_cuda(_record, name, loop)
    assert races or orders


def test_memory_that_collectives_use_goes_to_nobody_else(on_pretend_cuda: PretendProcess) -> None:
    """A collective that nobody finishes, whose tensors are dropped."""
    assert on_pretend_cuda(_drop, True) == []
    assert on_pretend_cuda(_drop, False) != []


def _drop(told: bool) -> list[str]:
    from zeroopt.collectives.select import connect_transport

    from .ranks import Rank, on_ranks

    def run(rank: Rank) -> None:
        transport = connect_transport("torch", torch.distributed.group.WORLD, rank.device)
        with rank.recorded():
            transport.start_reduce_scatter(torch.ones(4096, device=rank.device), torch.empty(2048, device=rank.device))
            torch.zeros(4096, device=rank.device)  # in the same memory, if it is free

    with patch.object(Tensor, "record_stream", Tensor.record_stream if told else nothing):
        return [str(race) for race in on_ranks(2, run)[1].races()]
