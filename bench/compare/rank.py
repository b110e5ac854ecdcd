"""What a rank does.

First a rehearsal with a tiny model, for what is loaded or allocated at a first step; then the wrapping and the warm-up, during
which another process watches how much memory the ranks hold; then the timed steps, while nobody does; then some under the
profiler.
"""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from bench.compare.bandwidth import Bandwidth, measure_bandwidth
from bench.compare.clock import Clock, CpuClock, make_clock
from bench.compare.methods import METHODS, Method, Training
from bench.compare.network import sent_bytes
from bench.compare.peak import Peak
from bench.compare.setting import NUM_BATCHES, Setting
from bench.compare.timeline import Range, trace
from bench.watch import Watch

WARMUP_STEPS = 3  # buffers are made, and buckets planned anew
PROFILED_STEPS = 4  # the later ones as they are in the middle of training


@dataclass(frozen=True)
class Job:
    """What a rank is told.

    Attributes:
        steps: that are timed; 0 where only memory is asked for.
        timeline: whether some more are profiled.
    """

    method: str
    setting: Setting
    steps: int
    timeline: bool


@dataclass
class Figures:
    """What one rank has measured.

    Attributes:
        forward_backward_s, optimizer_s: of each timed step.
        cpu_s: processor time of this rank in all timed steps, threads of its libraries included.
        sent_bytes: over TCP in all timed steps; None where nobody counts.
        losses: this rank's, of each step from the first on.
        resident_bytes, device_bytes: peaks above what the rehearsal left.
        bandwidth: measured by the bound.
        ranges: of rank 0.
    """

    wrap_s: float
    forward_backward_s: list[float]
    optimizer_s: list[float]
    cpu_s: float
    sent_bytes: int | None
    losses: list[float]
    resident_bytes: int
    device_bytes: int | None
    bandwidth: Bandwidth | None
    ranges: list[Range]


class Loop:
    """The training loop, the same for all methods."""

    def __init__(self, training: Training, setting: Setting, device: torch.device) -> None:
        self.training, self.setting, self.device = training, setting, device
        self.step_number = 0
        self.losses: list[Tensor] = []
        micros = range(setting.accumulation)
        self.batches = [[self.draw(batch, micro) for micro in micros] for batch in range(NUM_BATCHES)]

    def draw(self, batch: int, micro: int) -> tuple[Tensor, Tensor]:
        tokens, targets = self.setting.draw(batch, micro, dist.get_rank())
        return tokens.to(self.device), targets.to(self.device)

    def run(self, steps: int) -> list[Clock]:
        return [self.step() for _ in range(steps)]

    def run_to_the_end(self, steps: int) -> None:
        """Some steps and the forward after them, which waits for whatever is still on its way.

        A message that is received after a profiler has stopped would write into what the profiler has freed.
        """
        self.run(steps)
        with torch.no_grad(), record_function("forward"):
            self.training.forward(*self.batches[0][0])
        dist.barrier()

    def step(self) -> Clock:
        clock = make_clock(self.device)
        clock.mark()
        batches = self.batches[self.step_number % NUM_BATCHES]
        losses = [self.forward_backward(*batch, last=batch is batches[-1]) for batch in batches]
        clock.mark()
        with record_function("step"):
            self.training.step()
        clock.mark()
        self.losses.append(torch.stack(losses).mean())
        self.step_number += 1
        return clock

    def forward_backward(self, tokens: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        with nullcontext() if last else self.training.unsynchronised():
            with record_function("forward"):
                loss = self.training.forward(tokens, targets)
            with record_function("backward"):
                self.training.backward(loss, self.setting.accumulation)
        if not last:
            self.training.end_micro_batch()
        return loss.detach().float()


def work(job: Job, watch: Watch) -> Figures:
    """Of this rank. Collective."""
    device = device_of(job.setting)
    method = METHODS[job.method]
    Loop(prepare(method, job.setting.tiny(), device), job.setting.tiny(), device).run(1)
    gc.collect()
    peak = Peak(device)
    watch.begin()
    return measure(job, method, device, peak, watch)


def device_of(setting: Setting) -> torch.device:
    """Of this rank, where it then works by default."""
    if setting.device != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    return device


def prepare(method: Method, setting: Setting, device: torch.device) -> Training:
    return method.prepare(build(method, setting, device), setting)


def build(method: Method, setting: Setting, device: torch.device) -> nn.Module:
    if method.on_meta:
        with torch.device("meta"):
            return setting.make_model()
    return setting.make_model().to(device)


def measure(job: Job, method: Method, device: torch.device, peak: Peak, watch: Watch) -> Figures:
    net = build(method, job.setting, device)
    dist.barrier()
    wrapping = CpuClock()
    wrapping.mark()
    training = method.prepare(net, job.setting)
    wrapping.mark()
    loop = Loop(training, job.setting, device)
    loop.run(WARMUP_STEPS)
    resident, on_device = peak.resident(), peak.on_device()
    watch.end()
    timed = time_steps(loop, job.steps) if job.steps else NOTHING_TIMED
    ranges = trace(lambda: loop.run_to_the_end(PROFILED_STEPS)) if job.timeline else []
    share = max(1, job.setting.parameters // dist.get_world_size())
    return Figures(
        wrap_s=wrapping.seconds()[0],
        forward_backward_s=timed.forward_backward_s,
        optimizer_s=timed.optimizer_s,
        cpu_s=timed.cpu_s,
        sent_bytes=timed.sent_bytes,
        losses=torch.stack(loop.losses).tolist(),
        resident_bytes=resident,
        device_bytes=on_device,
        bandwidth=measure_bandwidth(share, device) if job.steps and not method.communicates else None,
        ranges=ranges if dist.get_rank() == 0 else [],
    )


@dataclass(frozen=True)
class Timed:
    """As in `Figures`."""

    forward_backward_s: list[float]
    optimizer_s: list[float]
    cpu_s: float
    sent_bytes: int | None


NOTHING_TIMED = Timed([], [], 0.0, None)


def time_steps(loop: Loop, steps: int) -> Timed:
    """Collective."""
    sent_before, cpu_before = sent_bytes(), time.process_time()
    seconds = [clock.seconds() for clock in loop.run(steps)]
    cpu_s = time.process_time() - cpu_before
    dist.barrier()
    sent_after = sent_bytes()
    return Timed(
        forward_backward_s=[forward_backward for forward_backward, _ in seconds],
        optimizer_s=[optimizer for _, optimizer in seconds],
        cpu_s=cpu_s,
        sent_bytes=None if sent_before is None or sent_after is None else sent_after - sent_before,
    )
