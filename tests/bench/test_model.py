"""The model of the benchmarks is the same however it is made: on the meta device, with activation checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
from bench.model import INIT, make_model

SIZES: dict[str, int] = {"vocabulary": 32, "tokens": 8, "layers": 2, "width": 64}


def seeded(**options: Any) -> nn.Module:
    torch.manual_seed(3)
    return make_model(**SIZES, **options)


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    tokens = torch.arange(9).unsqueeze(0)
    loss: Tensor = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return [loss.detach(), *(param.grad for param in model.parameters() if param.grad is not None)]


def test_checkpointing_changes_no_bit() -> None:
    plain, checkpointed = (loss_and_gradients(seeded(checkpointing=on)) for on in (False, True))
    assert len(plain) == len(checkpointed)
    assert all(map(torch.equal, plain, checkpointed))


def value_differences() -> list[str]:
    """Names of the parameters that a wrapped model from the meta device has other values of."""
    built = seeded()
    with torch.device("meta"):
        unmade = make_model(**SIZES)
    torch.manual_seed(3)
    model, _ = zeroopt.wrap(unmade, torch.optim.AdamW(unmade.parameters()), init=INIT)
    values = dict(model.module.named_parameters())
    return [name for name, expected in built.named_parameters() if not torch.equal(expected, values[name])]


def test_values_from_the_meta_device_are_those_of_the_constructor(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(1, value_differences) == [[]]
