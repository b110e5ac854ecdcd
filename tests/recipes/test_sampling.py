"""Samples of a step are the same on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from worker_pool import RunOnRanks

from recipes.sampling import draw, own_part


def drawn(batch: int) -> Tensor:
    return own_part(draw(1000, batch, seed=0, step=7)).clone()


def refused() -> str:
    with pytest.raises(ValueError, match="share equally") as refusal:
        drawn(5)
    return str(refusal.value)


def test_ranks_share_what_one_would_have(run_on_ranks: RunOnRanks) -> None:
    expected = draw(1000, 12, seed=0, step=7)
    for world_size in (2, 3):
        assert torch.equal(torch.cat(run_on_ranks(world_size, drawn, 12)), expected)
    assert not torch.equal(expected, draw(1000, 12, seed=0, step=8))


def test_a_batch_that_cannot_be_shared_is_refused(run_on_ranks: RunOnRanks) -> None:
    assert "got one of 5" in run_on_ranks(2, refused)[0]
