"""Wires from outside of the package: one that rounds gradients to a coarse grid, and one that sends them in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training import batch, build, loss_of
from transports import hosts
from worker_pool import RankError, RunOnRanks

import zeroopt
from tests.collectives.test_own_transport import plain
from zeroopt.collectives import Wire

LR = 0.5
GRID = 2**-8
TRANSPORTS = ["shm", "pairwise", "torch", "all_to_all", plain]


def on_grid(values: Tensor) -> Tensor:
    return values.div(GRID).round().mul(GRID)


class GridWire(Wire):
    """What is on a grid stays on it when it is summed: backends may sum it, and sums may travel on."""

    def encode(self, full: Tensor, num_slices: int) -> Tensor:
        return full.copy_(on_grid(full))


class ByteWire(Wire):
    """Each slice as a scale and a byte for each element, a quarter of the bytes: no backend sums that, nor do sums travel on.

    Args:
        step: of the scales, which are powers of it, so that what comes out is easily told.
    """

    backend_sums = False
    nests = False

    def __init__(self, step: float = 2.0) -> None:
        super().__init__(torch.float32)
        self.step = step

    def encode(self, full: Tensor, num_slices: int) -> Tensor:
        values = full.view(num_slices, -1)
        scales, codes = quantize(values, self.step)
        travelling = full.view(torch.uint8)[: num_slices * (4 + values.shape[1])].view(num_slices, -1)
        travelling[:, :4] = scales.view(torch.uint8)
        travelling[:, 4:] = codes.view(torch.uint8)
        return travelling.view(-1)

    def combine(self, slices: Sequence[Tensor], out: Tensor, base: Tensor | None) -> None:
        total = torch.zeros_like(out)
        for encoded in slices:
            total += encoded[4:].view(torch.int8) * encoded[:4].clone().view(torch.float32)
        torch.add(total, base if base is not None else 0.0, out=out)


def quantize(values: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """The scale of each row, [rows, 1], and its codes."""
    largest = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    scales = torch.full_like(largest, step) ** (largest / 127).log2().div(torch.tensor(step).log2()).ceil()
    return scales, values.div(scales).round().to(torch.int8)


def restored(values: Tensor, step: float = 2.0) -> Tensor:
    """What becomes of a slice that travels as bytes."""
    scales, codes = quantize(values.view(1, -1), step)
    return (codes * scales).view(-1)


class Line(nn.Module):
    """One parameter, of which each rank's gradient is what it is given."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numel))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum()


NUMEL = 4096  # so that slices are no longer than what they hold, for 1, 2 and 4 ranks


def gradient_of(rank: int, number: int) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(100 * number + rank))


def step_twice(wire: Wire, transport: Any, stage: int, of_hosts: list[int] | None = None) -> tuple[str, Tensor]:
    """The transport's name, and the parameter after a step on the sum of two backward passes, of which no_sync() is told
    nothing."""
    line = Line(NUMEL)
    optimizer = torch.optim.SGD(line.parameters(), lr=LR)
    with hosts(of_hosts or [0] * dist.get_world_size()):
        model, optimizer = zeroopt.wrap(line, optimizer, stage=stage, wire=wire, transport=transport, fused=False)
    for number in range(2):
        model(gradient_of(dist.get_rank(), number)).backward()
    optimizer.step()
    return model.replica.transport.name, model.module.weight.detach().clone()


def mean_of_means(encoded: Any, world_size: int) -> Tensor:
    """The parameter that it has to come to."""
    total = torch.zeros(NUMEL)
    for number in range(2):
        shares = [gradient_of(rank, number) / world_size for rank in range(world_size)]
        total += torch.stack([encoded(share) for share in shares]).sum(dim=0)
    return -LR * total


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda kind: kind if isinstance(kind, str) else kind.__name__)
def test_gradients_are_rounded_to_the_grid_before_they_are_summed(
    run_on_ranks: RunOnRanks, transport: Any, stage: int
) -> None:
    for _, weight in run_on_ranks(2, step_twice, GridWire(), transport, stage):
        assert torch.equal(weight, mean_of_means(on_grid, 2))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("transport", "world_size"), [("auto", 1), *((name, n) for name in TRANSPORTS[:4] for n in (2, 4))]
)
def test_gradients_travel_in_bytes(run_on_ranks: RunOnRanks, transport: Any, world_size: int, stage: int) -> None:
    def as_bytes(share: Tensor) -> Tensor:
        return torch.cat([restored(piece) for piece in share.view(world_size, -1)])

    expected = mean_of_means(as_bytes, world_size)
    for name, weight in run_on_ranks(world_size, step_twice, ByteWire(), transport, stage):
        assert transport == "auto" or name == transport
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)
        assert not torch.equal(weight, mean_of_means(torch.clone, world_size))


def sent_bytes(wire: Wire | None) -> int:
    line = Line(NUMEL)
    model, _ = zeroopt.wrap(line, torch.optim.SGD(line.parameters(), lr=LR), wire=wire, transport="pairwise")
    model(gradient_of(dist.get_rank(), 0)).backward()
    return int(model.replica.transport.sent_bytes)


def test_bytes_are_a_quarter(run_on_ranks: RunOnRanks) -> None:
    as_they_are, in_bytes = (run_on_ranks(2, sent_bytes, wire)[0] for wire in (None, ByteWire()))
    # Besides, both send which parameters were used.
    assert as_they_are - in_bytes == 4 * NUMEL // 2 - (4 + NUMEL // 2)


@pytest.mark.parametrize(("wire", "expected"), [(GridWire(), "hybrid"), (ByteWire(), "pairwise")])
def test_what_does_not_nest_goes_by_messages_between_hosts(run_on_ranks: RunOnRanks, wire: Wire, expected: str) -> None:
    for name, _ in run_on_ranks(4, step_twice, wire, "auto", 2, [0, 0, 1, 1]):
        assert name == expected


def refuse(**options: Any) -> None:
    line = Line(NUMEL)
    zeroopt.wrap(line, torch.optim.SGD(line.parameters(), lr=LR), **options)


def refuse_different() -> None:
    refuse(wire=ByteWire(2.0 + dist.get_rank()))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"wire": 8}, "ConfigError", "expected wire to be a zeroopt.collectives.Wire or None, got int"),
        ({"wire": GridWire(), "stage": 0}, "NotSupportedError", "wire is supported in stages 1 and 2"),
        (
            {"wire": GridWire(), "reduce_dtype": torch.bfloat16},
            "ConfigError",
            "expected reduce_dtype or wire, got both",
        ),
        ({"wire": Wire(torch.int8)}, "ConfigError", "expected wire.dtype to be one of None, torch.float32"),
    ],
)
def test_what_is_refused(run_on_ranks: RunOnRanks, options: dict[str, Any], error: str, text: str) -> None:
    for outcome in run_on_ranks.outcomes(2, refuse, **options):
        assert isinstance(outcome, RankError)
        assert outcome.type_name == error
        assert outcome.message.startswith(text)


def test_ranks_have_to_have_the_same_one(run_on_ranks: RunOnRanks) -> None:
    first, second = run_on_ranks.outcomes(2, refuse_different)
    assert first == second
    assert "ByteWire(dtype=torch.float32, step=2.0)" in str(first)
    assert "ByteWire(dtype=torch.float32, step=3.0)" in str(first)


def train(**options: Any) -> list[Tensor]:
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=0.01), **options)
    for step in range(3):
        loss_of(model(batch("mlp", step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_wire_that_does_nothing_is_reduce_dtype(run_on_ranks: RunOnRanks, dtype: torch.dtype | None) -> None:
    expected = run_on_ranks(2, train, stage=2, reduce_dtype=dtype)
    for params, others in zip(run_on_ranks(2, train, stage=2, wire=Wire(dtype)), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))
