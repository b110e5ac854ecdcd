"""One step under torch's profiler: what the training thread does, and which gradients and parameters are under way meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

LOOP = ("forward", "backward", "step")
COLLECTIVES = ("gloo:", "nccl:", "c10d::", "zeroopt::", "FSDP::", "DistributedDataParallel")
IDLE = "idle"  # the training thread runs no operator: it waits, or Python is slow
SHORTEST_IDLE_MS = 1
BACKWARD = "autograd::engine"  # in a thread of its own where there is an accelerator

Interval = tuple[float, float]


@dataclass(frozen=True)
class Range:
    """Milliseconds since the first range of the trace.

    Attributes:
        thread: where it ran, a number as the profiler gives it.
    """

    name: str
    start_ms: float
    end_ms: float
    thread: int


def trace(run: Callable[[], object]) -> list[Range]:
    """What is of interest of a run, in the order of its start."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return ranges_of(profiler.events())


def ranges_of(events: Iterable[FunctionEvent]) -> list[Range]:
    """The loop's own, collectives, and where the threads that train run no operator."""
    begin = min((event.time_range.start for event in events), default=0)
    everything = [
        Range(event.name, (event.time_range.start - begin) / 1e3, (event.time_range.end - begin) / 1e3, event.thread)
        for event in events
    ]
    phases = [r for r in everything if r.name in LOOP]
    threads = {r.thread for r in everything if r.name in LOOP or r.name.startswith(BACKWARD)}
    operators = [(r.start_ms, r.end_ms) for r in everything if r.thread in threads and is_operator(r.name)]
    idle = [
        Range(IDLE, start, end, phase.thread)
        for phase in phases
        for start, end in without((phase.start_ms, phase.end_ms), operators)
        if end - start >= SHORTEST_IDLE_MS
    ]
    kept = [*phases, *idle, *(r for r in everything if r.name.startswith(COLLECTIVES))]
    first = min((r.start_ms for r in kept), default=0)
    kept = [Range(r.name, r.start_ms - first, r.end_ms - first, r.thread) for r in kept]
    return sorted(kept, key=lambda r: r.start_ms)


def is_operator(name: str) -> bool:
    """Some of zeroopt's work is done without torch's operators."""
    return name.startswith("aten::") or (name.startswith("zeroopt::") and not name.startswith("zeroopt::wait_"))


@dataclass(frozen=True)
class Span:
    """Milliseconds since the step began.

    Attributes:
        lane: "forward", "backward", "step", "gradients", "parameters" or "waiting".
        bucket: its number, where the trace tells it.
    """

    lane: str
    start_ms: float
    end_ms: float
    bucket: str = ""


@dataclass(frozen=True)
class Step:
    """All that falls into it; parameters that the step before has sent arrive in its forward."""

    length_ms: float
    spans: list[Span]

    def lane(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.lane == name]


def steady_step(ranges: Sequence[Range]) -> Step | None:
    """A whole step of a trace of median length, not the first, which begins with nothing under way; None where there is none."""
    steps = list(whole_steps(ranges))
    if not steps:
        return None
    later = sorted(steps[1:] or steps, key=lambda step: step[1] - step[0])
    begin, end = later[len(later) // 2]
    spans = [
        Span(span.lane, max(span.start_ms, begin) - begin, min(span.end_ms, end) - begin, span.bucket)
        for span in spans_of(ranges)
        if span.start_ms < end and span.end_ms > begin
    ]
    return Step(end - begin, spans)


def whole_steps(ranges: Sequence[Range]) -> Iterator[Interval]:
    """From the first forward to the end of the optimizer's step."""
    before = 0.0
    for end in [r.end_ms for r in ranges if r.name == "step"]:
        yield min((r.start_ms for r in ranges if r.name in LOOP and r.start_ms >= before), default=before), end
        before = end


def spans_of(ranges: Sequence[Range]) -> Iterator[Span]:
    """Of the whole trace."""
    yield from (Span(r.name, r.start_ms, r.end_ms) for r in ranges if r.name in LOOP)
    travels = list(buckets_under_way(ranges)) or list(collectives_under_way(ranges))
    yield from travels
    for r in ranges:
        if r.name == IDLE:
            nothing_to_wait_for = without((r.start_ms, r.end_ms), [(span.start_ms, span.end_ms) for span in travels])
            for start, end in without((r.start_ms, r.end_ms), list(nothing_to_wait_for)):
                yield Span("waiting", start, end)


def collectives_under_way(ranges: Sequence[Range]) -> Iterator[Span]:
    """As the backend's own threads work on them: from when they begin, not from when they are asked for."""
    for r in ranges:
        if r.name.startswith(("gloo:", "nccl:")):
            if "gather" in r.name or "broadcast" in r.name:
                yield Span("parameters", r.start_ms, r.end_ms)
            elif "reduce" in r.name:
                yield Span("gradients", r.start_ms, r.end_ms)


def buckets_under_way(ranges: Sequence[Range]) -> Iterator[Span]:
    """zeroopt's, from where a bucket starts to travel to where the wait for it ends. Stage 0 gathers gradients, in the backward."""
    backwards = [r for r in ranges if r.name == "backward"]
    for i, r in enumerate(ranges):
        for phase, wait in (("reduce_scatter", "wait_for_reduce"), ("all_gather", "wait_for_gather")):
            bucket = r.name.removeprefix(f"zeroopt::{phase} ")
            arrival = next((other for other in ranges[i:] if other.name == f"zeroopt::{wait} {bucket}"), None)
            if arrival is not None:
                early = any(backward.start_ms <= r.start_ms <= backward.end_ms for backward in backwards)
                lane = "gradients" if phase == "reduce_scatter" or early else "parameters"
                yield Span(lane, r.start_ms, arrival.end_ms, bucket.split()[1])


def without(whole: Interval, others: Sequence[Interval]) -> Iterator[Interval]:
    """The parts of an interval that no other covers."""
    reached, stop = whole
    for start, end in sorted(others):
        if end <= reached:
            continue
        if start >= stop:
            break
        if start > reached:
            yield reached, start
        reached = end
    if reached < stop:
        yield reached, stop
