"""The state that an optimizer is found to keep is what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import zeroopt
from zeroopt.probing.state_size import StateSize

SHAPE = (96, 80)  # of more elements than are stepped for real


def kept(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> int:
    """Bytes after a step, numbers aside."""
    param.grad = torch.ones_like(param)
    optimizer.step()
    leaves: list[Any] = tree_leaves(dict(optimizer.state[param]))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel() > 1)


CASES = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True, "fused": True}),
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adadelta, {"foreach": True}),
    (torch.optim.ASGD, {}),
    (torch.optim.NAdam, {}),
    (zeroopt.optim.FusedLAMB, {}),
    *([(torch.optim.Adafactor, {})] if hasattr(torch.optim, "Adafactor") else []),
    *([(torch.optim.Muon, {})] if hasattr(torch.optim, "Muon") else []),
]


@pytest.mark.parametrize(("cls", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_it_is_what_a_step_makes(cls: Any, options: dict[str, Any]) -> None:
    param = nn.Parameter(torch.ones(SHAPE))
    optimizer = cls([param], lr=0.1, **options)
    found = StateSize(optimizer, 0).of_tensor(SHAPE, torch.float32)
    assert not optimizer.state
    assert found == kept(optimizer, param)


def test_elements_have_theirs_in_proportion() -> None:
    size = StateSize(torch.optim.Adam([nn.Parameter(torch.ones(3))]), 0)
    assert size.of_elements(1000, torch.float32) == 8000
    assert size.of_elements(1000, torch.bfloat16) == 4000


class FactorsByValue(torch.optim.Optimizer):
    """Keeps a value for each row, one for each column and one for each element taken together; looks at values."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            assert param.grad.abs().max().item() > 0
            rows, columns = param.shape
            self.state[param] = {
                "rows": torch.ones(rows, 1),
                "parts": [torch.ones(columns), torch.ones(rows * columns, dtype=torch.uint8)],
                "step": torch.tensor(1.0),
            }


def test_a_step_that_looks_at_values_is_taken_on_small_tensors() -> None:
    size = StateSize(FactorsByValue([nn.Parameter(torch.ones(2, 2))]), 0)
    assert size.of_tensor((5000, 3000), torch.float32) == 4 * 5000 + 4 * 3000 + 5000 * 3000
