"""Trains one trunk on four tasks: which digit, by how much turned, where, and what is in the covered parts of a picture.

    python -m recipes.many_tasks                                      two ranks here: by DDP, then by zeroopt, side by side
    torchrun --nproc-per-node 8 -m recipes.many_tasks --preset vit-l

In each step every rank works on one task, and in the next step on the next one: so heads are used by some ranks, or by none. The trunk
has an optimizer of its own, and the heads another.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import zeroopt
from recipes.command import main, make_parser, rate_at
from recipes.digits import Digits, load_digits
from recipes.many_tasks.model import ManyHeads
from recipes.many_tasks.presets import PRESETS
from recipes.many_tasks.tasks import Task
from recipes.method import autocast
from recipes.outcome import Figure, Outcome
from recipes.run import Run, mean_over_ranks
from recipes.sampling import draw, own_part

TEST_SEED = 1 << 32  # of pictures to test with, away from those of any step


def prepare(
    method: str, model: ManyHeads, trunk: torch.optim.Optimizer, heads: torch.optim.Optimizer, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    """The model and its two optimizers, made data-parallel. Collective.

    DDP has to be told that heads may be unused. zeroopt has not; it wraps the model with one optimizer after the other.

    Args:
        options: of `zeroopt.wrap`.
    """
    if method == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=True), trunk, heads
    wrapped, trunk = zeroopt.wrap(model, trunk, **options)
    wrapped, heads = zeroopt.wrap(wrapped, heads, **options)
    return wrapped, trunk, heads


def train(args: Namespace, device: torch.device) -> Outcome:
    preset = PRESETS[args.preset]
    steps = args.steps or preset.steps
    digits, unseen = load_digits()
    run = Run(args, device)

    torch.manual_seed(args.seed)
    network = preset.make().to(device)
    trunk: torch.optim.Optimizer = torch.optim.AdamW(
        network.trunk.parameters(), lr=preset.rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    heads: torch.optim.Optimizer = torch.optim.AdamW(network.heads.parameters(), lr=preset.head_rate, weight_decay=0.0)
    schedules = [LambdaLR(optimizer, lambda step: rate_at(step, steps)) for optimizer in (trunk, heads)]
    model, trunk, heads = prepare(args.method, network, trunk, heads, **preset.options())

    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(args.seed * ranks + rank)
    for step in run.steps("training", steps):
        task = network.tasks[(step + rank) % len(network.tasks)]
        chosen = own_part(draw(len(digits), ranks * preset.rank_batch, args.seed, step))
        pictures, targets = task.pose(digits.at(chosen), generator)
        with autocast(args.method, device, bfloat16=preset.bfloat16):
            answers = model(pictures.to(device), task.name)
        loss = task.loss(answers.float(), targets.to(device))
        loss.backward()
        for optimizer in (trunk, heads):
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        run.note(loss)
    return run.outcome(model, [examine(network, task, unseen, device) for task in network.tasks])


@torch.no_grad()
def examine(model: ManyHeads, task: Task, digits: Digits, device: torch.device) -> Figure:
    """How good the answers to one task are, beside guesses. Every rank looks at other pictures. Collective."""
    model.eval()
    pictures, targets = task.pose(digits, torch.Generator().manual_seed(TEST_SEED + dist.get_rank()))
    answers = torch.cat([model(some.to(device), task.name).float().cpu() for some in pictures.split(64)])
    model.train()
    scores = [task.score(answers, targets).item(), task.score(task.guess(targets), targets).item()]
    score, guess = mean_over_ranks(scores, device)
    return Figure(f"{task.name}: {task.measure}", score, guess, "guessing", task.higher_is_better)


def parser() -> ArgumentParser:
    return make_parser("many_tasks", __doc__, PRESETS)


if __name__ == "__main__":
    sys.exit(main(train, parser()))
