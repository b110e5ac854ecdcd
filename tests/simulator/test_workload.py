"""What a model's buckets are to a rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zeroopt.errors import ConfigError
from zeroopt.planner.transformer import transformer_of
from zeroopt.simulator.workload import Load, Workload, count_operations


def test_operations_are_those_of_products() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    counted = count_operations(model, torch.empty(10, 8))
    by_weight = {"0.weight": 2 * 10 * 8 * 16, "2.weight": 2 * 10 * 16 * 4}
    bias = by_weight["0.weight"] * 16 / (8 * 16 + 16)
    assert counted.by_param == {
        "0.weight": pytest.approx(by_weight["0.weight"] - bias),
        "0.bias": pytest.approx(bias),
        "2.weight": by_weight["2.weight"],
    }
    forward = sum(by_weight.values())
    # Nobody asks for the gradient of the input.
    assert counted.backward_factor == pytest.approx((2 * forward - by_weight["0.weight"]) / forward)


class Shifted(nn.Linear):
    """Has a tensor that is no buffer, and counts."""

    calls = 0
    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x + self.shift)


def test_a_model_that_needs_a_tensor_with_values_is_refused_and_stays_as_it_is() -> None:
    model = Shifted(8, 4)
    model.shift = torch.ones(8)
    with pytest.raises(ConfigError, match="cannot be run on the meta device.*register tensors"):
        count_operations(model, torch.empty(10, 8))
    assert model.calls == 0


@pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="torch before 2.6 checkpoints nothing on the meta device")
def test_a_transformer_computes_six_operations_a_parameter_and_token_and_more_with_checkpointing() -> None:
    tokens, plain = 64, transformer_of(0, layers=4, width=256, vocabulary=512)
    matrices = sum(p.numel() for n, p in plain.named_parameters() if p.dim() == 2 and n != "tokens.weight")
    sample = torch.empty(1, tokens, dtype=torch.int64)
    counted = count_operations(plain, sample)
    forward = sum(counted.by_param.values())
    attention = 4 * 4 * tokens**2 * 256
    assert forward == pytest.approx(2 * tokens * matrices + attention, rel=0.02)
    assert counted.backward_factor == pytest.approx(2, rel=0.05)
    again = count_operations(transformer_of(0, layers=4, width=256, vocabulary=512, checkpointed=True), sample)
    assert sum(again.by_param.values()) == forward
    # The blocks' products once more, but for the last of each, whose result nobody needs.
    computed_again = 2 * tokens * 4 * 8 * 256**2 + attention
    assert again.backward_factor == pytest.approx(2 + computed_again / forward, rel=0.01)
    assert all(param.grad is None and param.is_meta for param in plain.parameters())


LOADS = st.lists(st.builds(Load, *[st.floats(1, 100)] * 6), min_size=1, max_size=12)


@given(loads=LOADS, num_bytes=st.floats(0.5, 200))
def test_buckets_cut_anew_hold_the_same(loads: list[Load], num_bytes: float) -> None:
    before = Workload(tuple(loads), "ring")
    after = before.in_buckets_of(num_bytes)
    for name in ("forward", "backward", "gradients", "parameters", "packed", "stepped"):
        assert sum(getattr(load, name) for load in after.loads) == pytest.approx(
            sum(getattr(load, name) for load in before.loads)
        )
    assert max(load.gradients for load in after.loads) <= num_bytes * (1 + 1e-9)
    assert (after.forward, after.backward) == (pytest.approx(before.forward), pytest.approx(before.backward))
