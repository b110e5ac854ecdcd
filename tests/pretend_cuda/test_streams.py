"""Streams of the user's own: models whose parts run on several, averages of weights beside the next forward, steps on another one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt

from .process import PretendProcess
from .training import batch_of

pytestmark = pytest.mark.slow

VOCABULARY, WIDTH = 19, 8
WARM_UP, STEPS = 0, 4  # buckets are planned anew in the first step


class Branches(nn.Module):
    """Two branches, the second of which runs on a stream of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        self.second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        on = Streams(tokens.device)
        side = on.fork(0)
        x = self.embed(tokens)
        on.wait(side)
        first = self.first(x)
        with on.use(side):
            second = self.second(x)
        on.hand_over(x, side)
        on.join(side)
        on.hand_over(second, on.current())
        return self.head(first + second)


class Streams:
    """Those of a device; on the CPU there are none, and all of this does nothing.

    Attributes:
        made: streams besides the current one, which stay the same.
    """

    made: dict[tuple[torch.device, int], Any] = {}  # noqa: RUF012

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_there = device.type == "cuda"

    def current(self) -> Any:
        return torch.cuda.current_stream(self._device) if self._is_there else None

    def fork(self, number: int) -> Any:
        """A stream, behind the current one."""
        if not self._is_there:
            return None
        stream = self.made.get((self._device, number))
        if stream is None:
            stream = self.made[self._device, number] = torch.cuda.Stream(self._device)
        self.wait(stream)
        return stream

    def wait(self, stream: Any) -> None:
        """Let a stream come behind the current one."""
        if self._is_there:
            stream.wait_stream(self.current())

    def join(self, stream: Any) -> None:
        """Let the current stream come behind another one."""
        if self._is_there:
            self.current().wait_stream(stream)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if self._is_there else nullcontext()

    def hand_over(self, tensor: Tensor, stream: Any) -> None:
        if self._is_there:
            tensor.record_stream(stream)


def in_one_stream(model: nn.Module, optimizer: torch.optim.Optimizer, averages: list[Tensor], on: Streams) -> None:
    """Only the model's own."""
    optimizer.step()


def average_beside_forward(
    model: nn.Module, optimizer: torch.optim.Optimizer, averages: list[Tensor], on: Streams
) -> None:
    """The average reads parameters that are on their way, on a stream behind the step, and the next step comes behind it."""
    on.join(on.fork(1))
    optimizer.step()
    with on.use(on.fork(1)):
        for average, param in zip(averages, model.parameters(), strict=True):
            average.lerp_(param.detach(), 0.5)


def average_before_reading(
    model: nn.Module, optimizer: torch.optim.Optimizer, averages: list[Tensor], on: Streams
) -> None:
    """The same, and then the stream of the step reads parameters outside of any forward."""
    average_beside_forward(model, optimizer, averages, on)
    total = torch.stack([param.detach().sum() for param in model.parameters()]).sum()
    on.join(on.fork(1))
    averages[0].flatten()[0] = total


def step_on_another(model: nn.Module, optimizer: torch.optim.Optimizer, averages: list[Tensor], on: Streams) -> None:
    """The step runs on a stream behind backward, which the next forward comes behind; in between, a third reads the norm."""
    side, third = on.fork(1), on.fork(2)
    with on.use(third):
        norm = optimizer.grad_norm  # type: ignore[attr-defined]
    with on.use(side):
        optimizer.step()
    on.join(side)
    on.join(third)
    averages[0].flatten()[0] = norm
    on.hand_over(norm, on.current())


STEPPERS: dict[str, Callable[..., None]] = {
    step.__name__: step for step in (in_one_stream, average_beside_forward, average_before_reading, step_on_another)
}


def train(
    name: str,
    options: dict[str, Any],
    accumulate: int,
    rank: int,
    device: torch.device,
    recorded: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Tensor]:
    """Parameters, and what else the steps have left."""
    model, on = Branches(), Streams(device)
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param.data, std=0.3, generator=generator)
    model.to(device)
    averages = [param.detach().clone() for param in model.parameters()]
    batches = iter([batch_of(rank, number, device) for number in range((WARM_UP + STEPS) * accumulate)])
    wrapped, optimizer = zeroopt.wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), **options)

    def train_step() -> None:
        for _ in range(accumulate):
            tokens, following = next(batches)
            nn.functional.cross_entropy(wrapped(tokens), following).backward()
        STEPPERS[name](wrapped, optimizer, averages, on)
        optimizer.zero_grad()

    for _ in range(WARM_UP):
        train_step()
    with recorded():
        for _ in range(STEPS):
            train_step()
        on.join(on.fork(1))
    return [tensor.detach().cpu().clone() for tensor in (*wrapped.parameters(), *averages)]


def _train_on_cpu(*args: Any) -> list[Tensor]:
    return train(*args, torch.distributed.get_rank(), torch.device("cpu"))


def _train_here(*args: Any) -> dict[str, Any]:
    from .ranks import Rank, on_ranks
    from .surface import host_is_ahead

    def run(rank: Rank) -> list[Tensor]:
        return train(*args, rank.number, rank.device, rank.recorded)

    with host_is_ahead():  # else nobody would have to wait for what the host knows to be over
        values, recording = on_ranks(2, run)
    return {
        "values": values,
        "races": [str(race) for race in recording.races()],
        "wrong orders": recording.wrong_orders(range(20)),
    }


BUCKET_MB = {"small buckets": 0.0005, "one bucket": 25.0}
# Any three of the four come together.
CASES = [
    (name, stage, accumulate, list(BUCKET_MB)[(place + stage + accumulate) % 2])
    for place, name in enumerate(STEPPERS)
    for stage in (0, 1, 2)
    for accumulate in (1, 2)
]


@pytest.mark.parametrize(("name", "stage", "accumulate", "buckets"), CASES)
def test_streams_of_the_user_find_everything_in_order(
    name: str,
    stage: int,
    accumulate: int,
    buckets: str,
    on_pretend_cuda: PretendProcess,
    run_on_ranks: RunOnRanks,
) -> None:
    case = name, {"stage": stage, "bucket_mb": BUCKET_MB[buckets], "transport": "torch"}, accumulate
    expected = run_on_ranks(2, _train_on_cpu, *case)
    result = on_pretend_cuda(_train_here, *case)
    assert result["races"] == []
    assert result["wrong orders"] == {}
    for values in result["values"]:
        for value, other in zip(values, expected[0], strict=True):
            torch.testing.assert_close(value, other, rtol=0, atol=0)
