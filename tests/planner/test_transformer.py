"""A transformer comes near the size that was asked for, and trains."""

from __future__ import annotations

import pytest
import torch

from zeroopt.planner.transformer import transformer_of


@pytest.mark.parametrize("parameters", [1.5e8, 1.5e9, 17e9, 170e9])
@pytest.mark.parametrize("layers", [None, 24])
def test_it_has_about_so_many_parameters(parameters: float, layers: int | None) -> None:
    model = transformer_of(parameters, layers)
    numel = sum(param.numel() for param in model.parameters())
    assert numel == pytest.approx(parameters, rel=0.1)
    assert layers is None or len(model.blocks) == layers
    assert all(param.is_meta for param in model.parameters())


def test_layers_follow_from_a_width() -> None:
    model = transformer_of(1.5e9, width=1600)
    assert len(model.blocks) == 44
    both = transformer_of(0, layers=3, width=256, vocabulary=100)
    assert (len(both.blocks), both.norm.weight.numel()) == (3, 256)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_trains(checkpointed: bool) -> None:
    model = transformer_of(0, layers=2, width=128, vocabulary=50, checkpointed=checkpointed).to_empty(device="cpu")
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.02)
    loss = model(torch.arange(20).view(2, 10))
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(50.0).log().item(), rel=0.2)
    assert all(param.grad is not None for param in model.parameters())
