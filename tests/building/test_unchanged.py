"""A model through which something has run is as it was."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import Tensor, nn

from zeroopt.building.unchanged import unchanged


class Keeps(nn.Module):
    """Keeps of its forward whatever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.calls, self.last = 0, None
        self.all, self.table, self.seen, self.recent = list[Tensor](), {"first": 1}, {1, 2}, deque([1, 2])

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.last = self.calls + 1, x
        self.all.append(x)
        self.table["second"] = x
        self.seen.add(3)
        self.recent.appendleft(0)
        self.register_buffer("late", torch.ones(2), persistent=False)
        self.linear.weight = nn.Parameter(torch.ones(2, 2))
        self.more = nn.Linear(2, 2)
        return self.more(self.linear(x * self.late))


@pytest.mark.parametrize("fails", [False, True])
def test_what_modules_keep_is_gone(fails: bool) -> None:
    net = nn.Sequential(Keeps(), nn.Linear(2, 2))
    keeps = net[0]
    containers, weight = (keeps.all, keeps.table, keeps.seen, keeps.recent), keeps.linear.weight
    names = list(vars(keeps)), list(net.state_dict())
    with pytest.raises(ZeroDivisionError) if fails else unchanged(net), unchanged(net):
        net(torch.ones(3, 2))
        assert keeps.calls == len(keeps.all) == 1 and hasattr(keeps, "late")
        assert not fails or 1 / 0
    assert (keeps.calls, keeps.last, keeps.all) == (0, None, [])
    assert (keeps.table, keeps.seen, list(keeps.recent)) == ({"first": 1}, {1, 2}, [1, 2])
    assert all(a is b for a, b in zip((keeps.all, keeps.table, keeps.seen, keeps.recent), containers, strict=True))
    assert keeps.linear.weight is weight and (list(vars(keeps)), list(net.state_dict())) == names
    net(torch.ones(3, 2))
    assert keeps.calls == 1
