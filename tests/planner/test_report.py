"""Tables and JSON say what the estimate says."""

from __future__ import annotations

import json

import torch

from zeroopt import estimate_memory
from zeroopt.planner.estimate import MemoryEstimate
from zeroopt.planner.transformer import transformer_of


def estimate(**options: object) -> MemoryEstimate:
    model = transformer_of(0, layers=2, width=128, vocabulary=256)
    return estimate_memory(model, torch.optim.AdamW, world_size=4, **options)  # type: ignore[arg-type]


def test_json_has_every_variant_and_phase_in_bytes() -> None:
    made = estimate(tokens=32, memory=1e9)
    told = json.loads(json.dumps(made.as_json()))
    assert told["parameters"] == made.parameters and told["world_size"] == 4
    assert [variant["peak"] for variant in told["variants"]] == [v.training_peak for v in made.variants]
    for phase in made.asked.phases:
        assert told["asked"]["phases"][phase.name] == {"total": phase.total, **phase.parts}
    assert told["variants"][-1]["options"]["param_dtype"] == "bfloat16"
    assert told["advice"]["fits"] is True and told["advice"]["options"] == {}


def test_tables_have_a_row_for_each_phase_and_each_tier() -> None:
    made = estimate(tokens=32, memory=1e9)
    lines = made.lines()
    for phase in made.asked.phases:
        marked = [line for line in lines if line.startswith(phase.name + " ")]
        assert marked, phase.name
    (peak,) = [line for line in lines if " * " in line]
    assert peak.startswith(made.asked.peak_of_training.name)
    (stages,) = [line for line in lines if "stage 0" in line]
    assert "stage 2, shared" in stages
    each = made.variants[0].training_peak / made.parameters
    assert any(line.startswith("float32") and f"({each:.2f})" in line for line in lines)
    assert lines[-1] == "It fits into 1.0 GB as it is."
    assert str(made) == "\n".join(lines)


def test_what_is_not_counted_is_said() -> None:
    assert "activations not counted" in estimate(compare=False).lines()[1]
    assert "activations not counted" not in estimate(compare=False, tokens=32).lines()[1]
