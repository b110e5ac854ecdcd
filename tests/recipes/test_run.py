"""What a run notes down."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import nn
from worker_pool import RunOnRanks

from recipes.outcome import Figure, Outcome
from recipes.run import Run

HELD = 4_000_000  # elements


def train() -> Outcome:
    rank = torch.distributed.get_rank()
    run = Run(Namespace(method="zeroopt", preset="1m"), torch.device("cpu"))
    model = nn.Linear(2, 3)
    held = torch.ones(HELD)
    for step in run.steps("first", 5):
        run.note(torch.tensor(float(step + rank)))
    for _ in run.steps("second", 4, begin=2):
        run.note(held.sum() * 0)
    for _ in run.steps("third", 4, begin=4):
        raise AssertionError("there is no such step")
    return run.outcome(model, [Figure("loss", 1.0, 2.0)])


def test_losses_are_means_over_ranks_by_phase(run_on_ranks: RunOnRanks) -> None:
    outcome, _ = run_on_ranks(2, train)
    assert outcome.losses == {"first": [0.5, 1.5, 2.5, 3.5, 4.5], "second": [0.0, 0.0]}
    assert (outcome.parameters, outcome.world_size, outcome.method) == (9, 2, "zeroopt")
    assert min(outcome.peak_bytes, outcome.held_bytes) > 2 * HELD, (
        "of four bytes each, some may be shared with what was freed"
    )
