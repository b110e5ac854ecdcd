"""One run: a task by a method from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bench.quality.methods import METHODS
from bench.quality.tasks import TASKS

AT_ONCE = 500  # pieces that are validated


@dataclass(frozen=True)
class Run:
    """What is trained.

    Attributes:
        steps: instead of the task's own number.
    """

    task: str
    method: str
    seed: int
    steps: int | None = None


def train(run: Run) -> float:
    """The loss after training, on pieces that it has not seen. Collective; the same on all ranks but for rounding, or where ranks
    train alone that of this rank's model."""
    task, steps = TASKS[run.task], run.steps or TASKS[run.task].steps
    training, validation = task.pieces()
    torch.manual_seed(run.seed)
    net = task.make()
    model, optimizer = METHODS[run.method](net, torch.optim.AdamW(net.parameters(), lr=task.lr, weight_decay=0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_lr(step, steps))
    generator = torch.Generator().manual_seed(run.seed + 100)
    for _ in range(steps):
        batch = training[torch.randint(len(training), (task.batch,), generator=generator)]
        torch.autograd.backward(task.loss(model, batch[dist.get_rank() :: dist.get_world_size()]))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        losses = [task.loss(model, pieces).item() * len(pieces) for pieces in torch.split(validation, AT_ONCE)]
    return sum(losses) / len(validation)


def share_of_lr(step: int, steps: int) -> float:
    """Warm-up, then half a cosine down to a twentieth."""
    return min(1.0, (step + 1) * 30 / steps) * (0.525 + 0.475 * math.cos(math.pi * step / steps))
