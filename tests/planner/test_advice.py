"""What makes a training fit, from what changes least on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zeroopt import estimate_memory
from zeroopt.planner.advice import Advice
from zeroopt.planner.estimate import MemoryEstimate
from zeroopt.planner.transformer import transformer_of

MB = 1e6


def estimate(memory: float | None, **options: Any) -> MemoryEstimate:
    model = transformer_of(0, layers=4, width=512, vocabulary=1024)
    arguments = {"world_size": 8, "device": "cuda", "compare": False, **options}
    return estimate_memory(model, torch.optim.AdamW, memory=memory, **arguments)


def advice(memory: float, **options: Any) -> Advice:
    found = estimate(memory, **options).advice
    assert found is not None
    return found


def test_what_fits_is_left_as_it_is() -> None:
    peak = estimate(None).peak
    found = advice(peak)
    assert not found.changes and found.variant is not None and found.ranks is None
    assert found.lines() == [f"It fits into {peak / 1e9:.1f} GB as it is."]


@pytest.mark.parametrize("stage", [0, 1])
def test_another_stage_comes_first(stage: int) -> None:
    least = estimate(None, stage=stage + 1).peak
    assert advice(least, stage=stage).changes == {"stage": stage + 1}


def test_sharing_comes_before_tiers_where_it_can_be_had() -> None:
    shared = estimate(None, device="cpu", share_parameters=True).peak
    found = advice(shared, device="cpu")
    assert found.changes == {"share_parameters": True}
    assert found.variant is not None and found.variant.training_peak <= shared


def test_whatever_is_told_to_fit_fits_and_is_what_wrap_takes() -> None:
    peak = estimate(None).peak
    for part in (0.9, 0.8, 0.7):
        found = advice(part * peak)
        assert found.variant is not None
        again = estimate(None, **found.changes)
        assert again.peak == found.variant.training_peak <= part * peak


def test_more_ranks_help_where_what_is_shared_is_too_much() -> None:
    many = estimate(None, world_size=32).peak
    assert advice(many).ranks == 32
    assert advice(many, stage=0).ranks is None


def test_what_cannot_fit_is_said_not_to() -> None:
    found = advice(1 * MB)
    assert found.variant is None and found.ranks is None
    assert found.lines() == ["No options of zeroopt make it fit into 0.0 GB on so many ranks."]


def test_activations_are_named_where_they_are_most() -> None:
    found = advice(300 * MB, activations=2_000_000_000)
    assert found.share > 0.8
    assert "activation checkpointing" in found.lines()[-1]
