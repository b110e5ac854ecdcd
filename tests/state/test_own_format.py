"""State dicts of an optimizer with a format of its own are read by its class, one parameter after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeroopt.state.own_format import in_torchs_format


class Hides(torch.optim.Optimizer):
    """Sums gradients; its state dicts have the sums in dicts within, and twice as large."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.loads = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                total = self.state[param].setdefault("sum", torch.zeros_like(param)).add_(param.grad)
                param.sub_(total, alpha=group["lr"])

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        hidden = {key: {"hidden": {"sum": 2 * entry["sum"]}} for key, entry in found["state"].items()}
        return {**found, "state": hidden}

    def load_state_dict(self, state_dict: Any) -> None:
        self.loads += 1
        shown = {key: {"sum": entry["hidden"]["sum"] / 2} for key, entry in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": shown})


def stepped(cls: Any = Hides) -> torch.optim.Optimizer:
    """Two groups; the last parameter has no gradient yet, and so no state."""
    params = [nn.Parameter(torch.full(shape, 1.0)) for shape in ((2, 3), (4,), (5,))]
    optimizer = cls([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}])
    for param in params[:2]:
        param.grad = torch.full_like(param, 3.0)
    params[2].grad = torch.zeros(5)
    optimizer.step()
    del optimizer.state[params[2]]
    return optimizer


def test_its_class_reads_it() -> None:
    optimizer = stepped()
    given = optimizer.state_dict()
    before = {id(p): p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
    read = in_torchs_format(optimizer, given)
    sums: dict[int, dict[str, Tensor]] = read["state"]
    assert sums.keys() == {0, 1} and all(entry.keys() == {"sum"} for entry in sums.values())
    assert torch.equal(sums[0]["sum"], torch.full((2, 3), 3.0)) and torch.equal(sums[1]["sum"], torch.full((4,), 3.0))
    assert read["param_groups"] == given["param_groups"]
    assert given["state"][0].keys() == {"hidden"}, "what was given stays"
    assert optimizer.loads == 0 and all(
        torch.equal(p, before[id(p)]) for group in optimizer.param_groups for p in group["params"]
    )


def test_names_may_stand_for_positions() -> None:
    optimizer = stepped()
    given = optimizer.state_dict()
    names = ["a", "b", "c"]
    named = {
        "state": {names[key]: entry for key, entry in given["state"].items()},
        "param_groups": [{**group, "params": [names[i] for i in group["params"]]} for group in given["param_groups"]],
    }
    assert {key: list(entry) for key, entry in in_torchs_format(optimizer, named)["state"].items()} == {
        "a": ["sum"],
        "b": ["sum"],
    }


def test_what_is_torchs_or_as_it_is_or_of_other_parameters_stays() -> None:
    plain = stepped(lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    given = plain.state_dict()
    assert in_torchs_format(plain, given) is given
    optimizer = stepped()
    fewer = {**optimizer.state_dict(), "param_groups": optimizer.state_dict()["param_groups"][:1]}
    assert in_torchs_format(optimizer, fewer) is fewer
    as_it_is = torch.optim.Optimizer.state_dict(optimizer)
    assert in_torchs_format(optimizer, as_it_is) == as_it_is


def test_what_it_cannot_read_is_told() -> None:
    optimizer = stepped()
    given = optimizer.state_dict()
    given["state"][0] = {"elsewhere": given["state"][0].pop("hidden")}
    with pytest.raises(KeyError, match="hidden"):
        in_torchs_format(optimizer, given)
