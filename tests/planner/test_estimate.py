"""`zeroopt.estimate_memory`: everything side by side, and nothing slower for who does not ask."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import zeroopt
from zeroopt.errors import ConfigError
from zeroopt.planner.tiers import TIERS
from zeroopt.planner.transformer import transformer_of


def small() -> nn.Module:
    return transformer_of(0, layers=2, width=128, vocabulary=256)


def test_every_stage_and_tier_stand_side_by_side() -> None:
    estimate = zeroopt.estimate_memory(small(), torch.optim.AdamW, world_size=4, tokens=16, bucket_mb=1.0)
    places = [(stage, shared) for stage, shared in ((0, False), (1, False), (2, False), (2, True))]
    found = [(v.tier, v.stage, bool(v.options.get("share_parameters"))) for v in estimate.variants]
    assert found == [(tier, *place) for tier in TIERS for place in places]
    assert not estimate.refused
    assert all(variant.options["bucket_mb"] == 1.0 for variant in estimate.variants)
    assert estimate.knows_activations


def test_what_cannot_be_had_is_told_with_the_reason() -> None:
    estimate = zeroopt.estimate_memory(small(), torch.optim.Adadelta, world_size=4)
    assert [variant.tier for variant in estimate.variants] == ["float32"] * 4 + ["bfloat16"] * 4
    assert any("no fused kernel for Adadelta" in reason for reason in estimate.refused.values())
    assert not estimate.knows_activations


def test_the_peak_is_that_of_what_was_asked_for() -> None:
    estimate = zeroopt.estimate_memory(small(), torch.optim.AdamW, world_size=2, compare=False, stage=1)
    assert estimate.peak == estimate.asked.training_peak
    assert (estimate.asked.stage, estimate.variants) == (1, [])
    assert json.loads(json.dumps(estimate.as_json()))["asked"]["peak"] == estimate.peak


def test_activations_are_told_in_one_way_only() -> None:
    with pytest.raises(ConfigError, match="got several"):
        zeroopt.estimate_memory(small(), torch.optim.AdamW, world_size=2, tokens=16, activations=5)


def test_parameters_of_170_billion_take_no_memory() -> None:
    model = transformer_of(170e9, layers=8, width=40_000)
    estimate = zeroopt.estimate_memory(
        model, torch.optim.AdamW, world_size=10_000, device="cuda", tokens=2048, compare=False
    )
    assert estimate.parameters > 1.5e11
    assert 4 * estimate.parameters < estimate.peak < 16 * estimate.parameters


@pytest.mark.slow
def test_importing_zeroopt_imports_nothing_of_it() -> None:
    code = "import sys, zeroopt; print([m for m in sys.modules if 'planner' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
