"""What a trace of a step shows: for each bucket the phases that it goes through, where and in what order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.profiling import named_range

LAYERS = 6
BUCKET_MB = 40 * 40 * 4 / 2**20  # a layer


@dataclass(frozen=True)
class Range:
    """A range of a trace, in microseconds."""

    name: str
    start: float
    end: float

    def holds(self, other: Range) -> bool:
        return self.start <= other.start and other.end <= self.end


class Layers(nn.Module):
    """One bucket a layer. Gradients arrive in the order that the first plan expects, or in the reverse of it, which then no call of
    a module foretells."""

    def __init__(self, *, backwards: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(40, 40, bias=False) for _ in range(LAYERS))
        self.backwards = backwards

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers) if self.backwards else self.layers:
            x = torch.tanh(x @ layer.weight if self.backwards else layer(x))
        return x


def trace(options: dict[str, Any], backwards: bool = False) -> tuple[list[Range], list[str]]:
    """Two steps and a forward: zeroopt's ranges, those of the loop and matrix products, in the order of their start, and the
    buckets of the second step."""
    torch.manual_seed(0)
    net = Layers(backwards=backwards)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=BUCKET_MB, **options)
    x = torch.randn(3, 40)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            with record_function("forward"):
                loss = model(x).sum()
            with record_function("backward"):
                loss.backward()
            with record_function("step"):
                optimizer.clip_grad_norm_(1.0)
                optimizer.step()
            optimizer.zero_grad()
        with record_function("forward"):
            model(x)
    names = ("zeroopt::", "forward", "backward", "step", "aten::mm")
    ranges = [
        Range(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.name.startswith(names)
    ]
    return sorted(ranges, key=lambda r: r.start), [bucket.name for bucket in optimizer._trained.buckets]


def trace_stages(transport: str) -> list[tuple[list[Range], list[str]]]:
    return [trace({"stage": stage, "transport": transport}) for stage in (0, 1, 2)]


def called(ranges: list[Range], name: str) -> list[Range]:
    return [r for r in ranges if r.name == name]


def check_a_step(ranges: list[Range], buckets: list[str], stage: int) -> None:
    """The second step of a trace, in which nothing is planned anew."""
    forwards, backwards, steps = (called(ranges, name) for name in ("forward", "backward", "step"))
    backward, step, forward = backwards[1], steps[1], forwards[2]
    ranges = [r for r in ranges if r.start >= backward.start]

    def the(phase: str, bucket: str) -> Range:
        (found,) = called(ranges, f"zeroopt::{phase} {bucket}")
        return found

    starts = [the("reduce_scatter", bucket) for bucket in buckets]
    assert all(backward.holds(start) for start in starts)
    assert starts == sorted(starts, key=lambda r: r.start), "buckets start in their order"
    for bucket, start in zip(buckets, starts, strict=True):
        wait, summed = the("wait_for_reduce", bucket), the("sum", bucket)
        assert start.end <= wait.start
        assert start.end <= summed.start and summed.end <= wait.end
        gather, wait_for_gather = the("all_gather", bucket), the("wait_for_gather", bucket)
        assert wait.end <= gather.start and gather.end <= wait_for_gather.start
        stepped = the("step", bucket)
        assert step.holds(stepped) and wait.end <= stepped.start
        if stage > 0:  # in stage 0, what is gathered are gradients
            assert stepped.end <= gather.start
            assert forward.holds(wait_for_gather), "gathers are lazy"
    (agree,) = called(ranges, "zeroopt::agree_on_used")
    assert backward.holds(agree) and starts[-1].end <= agree.start
    assert not called(ranges, "zeroopt::replan")
    assert not called(ranges, "zeroopt::pack")


@pytest.mark.parametrize("transport", ["shm", "pairwise"])
def test_every_phase_of_every_bucket_has_a_range(run_on_ranks: RunOnRanks, transport: str) -> None:
    for rank in run_on_ranks(2, trace_stages, transport):
        for stage, (ranges, buckets) in enumerate(rank):
            assert len(buckets) == LAYERS
            assert buckets[0] == f"bucket 0 (layers.{LAYERS - 1}.weight … layers.{LAYERS - 1}.weight)"
            check_a_step(ranges, buckets, stage)
            *foreseen, replan = called(ranges, "zeroopt::replan")
            assert called(ranges, "step")[0].holds(replan)
            assert [called(ranges, "backward")[0].holds(one) for one in foreseen] == ([True] if stage == 2 else [])
            if stage > 0:
                clips, steps = called(ranges, "zeroopt::clip"), called(ranges, "step")
                assert [step.holds(clip) for step, clip in zip(steps, clips, strict=True)] == [True, True]


def test_reduces_begin_while_backward_goes_on(run_on_ranks: RunOnRanks) -> None:
    """Between two starts a layer's gradients are computed."""
    for ranges, buckets in run_on_ranks(2, trace, {"stage": 2}):
        backward = called(ranges, "backward")[1]
        starts = [r for r in ranges if r.name.startswith("zeroopt::reduce_scatter") and backward.holds(r)]
        assert len(starts) == len(buckets)
        products = called(ranges, "aten::mm")
        for one, next_one in pairwise(starts):
            assert any(one.end <= product.start and product.end <= next_one.start for product in products)


def test_gradients_that_had_to_wait_are_packed_together(run_on_ranks: RunOnRanks) -> None:
    for ranges, _ in run_on_ranks(2, trace, {"stage": 2}, backwards=True):
        first, second = called(ranges, "backward")
        packs = [r for r in ranges if r.name.startswith("zeroopt::pack bucket")]
        assert packs and all(first.holds(pack) for pack in packs), "before the new plan"
        assert not any(second.holds(pack) for pack in packs)


def test_the_own_step_of_an_optimizer_is_one_range(run_on_ranks: RunOnRanks) -> None:
    for ranges, _ in run_on_ranks(2, trace, {"stage": 1, "fused": False}):
        steps = [r.name for r in ranges if r.name.startswith("zeroopt::step")]
        assert steps == [f"zeroopt::step {LAYERS} buckets by AdamW"] * 2


def test_without_a_profiler_there_is_nothing_to_enter() -> None:
    nothing = named_range("step", "bucket 0")
    assert named_range("step", "bucket 1") is nothing
    with torch.autograd.profiler.profile():
        assert isinstance(named_range("step", "bucket 0"), record_function)
    assert named_range("step", "bucket 0") is nothing
