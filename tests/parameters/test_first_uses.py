"""The order in which a forward comes to parameters, and what it is told by."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from zeroopt.parameters.arriving import remove_idle_hooks
from zeroopt.parameters.first_uses import FirstUses

compiles = pytest.mark.skipif(
    sys.version_info >= (3, 14) and TorchVersion(torch.__version__) < "2.10",
    reason="this torch compiles nothing with this Python",
)


class Net(nn.Module):
    """Uses what it has in another order than it has it, and some past the modules that have it."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(4, 4, bias=False)
        self.own = nn.Parameter(torch.ones(4))
        self.attention = nn.MultiheadAttention(4, 1, bias=False)
        self.early = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.early.weight
        self.unused = nn.ModuleList([nn.Linear(4, 4, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x) * self.own
        x, _ = self.attention(x, x, x)
        result: Tensor = self.tied(self.late(x))
        return result


def names_of(net: nn.Module, params: list[nn.Parameter]) -> list[str]:
    names = {param: name for name, param in net.named_parameters()}
    return [names[param] for param in params]


USES = [
    "own",
    "unused.0.weight",
    "early.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "late.weight",
]


def test_first_uses_count() -> None:
    net = Net()
    uses = FirstUses(net)
    assert uses.params() == []
    net(torch.ones(2, 4))
    assert names_of(net, uses.params()) == USES
    net.late(torch.ones(2, 4))
    net(torch.ones(2, 4))
    assert names_of(net, uses.params()) == USES
    uses.stop()
    assert not any(part._forward_pre_hooks for part in net.modules())
    assert names_of(net, uses.params()) == USES, "it is still known"


def test_gradients_come_the_other_way_round() -> None:
    net = Net()
    uses = FirstUses(net)
    came: list[nn.Parameter] = []
    for param in net.parameters():
        param.register_post_accumulate_grad_hook(came.append)
    net(torch.ones(2, 4)).sum().backward()
    used = [param for param in uses.params()[::-1] if param.grad is not None]
    assert names_of(net, used)[0] == names_of(net, came)[0] == "late.weight"
    assert set(names_of(net, used)[1:3]) == set(names_of(net, came)[1:3])


def test_parts_that_are_called_alone_are_seen() -> None:
    net = Net()
    uses = FirstUses(net)
    net.late(torch.ones(2, 4))
    net.early(torch.ones(2, 4))
    assert names_of(net, uses.params()) == ["late.weight", "early.weight"]


def test_parameters_used_past_all_modules_are_not() -> None:
    net = Net()
    uses = FirstUses(net)
    F.linear(torch.ones(2, 4), net.late.weight)
    assert uses.params() == []


@compiles
@pytest.mark.parametrize("how", ["in place", "a part"])
def test_compiled_models_are_not_watched(how: str) -> None:
    net = Net()
    if how == "in place":
        net.compile(backend="eager")
    else:
        net.late.compile(backend="eager")
    uses = FirstUses(net)
    assert not any(part._forward_pre_hooks for part in net.modules())
    net.early(torch.ones(2, 4))
    assert uses.params() == []


@compiles
def test_what_is_compiled_meanwhile_foretells_nothing() -> None:
    net = Net()
    uses = FirstUses(net)
    net.early(torch.ones(2, 4))
    net.late.compile(backend="eager")
    assert uses.params() == []


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_not_watched(how: str) -> None:
    net = Net()
    uses = FirstUses(net)
    twin = remove_idle_hooks(copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net)))
    assert not any(part._forward_pre_hooks for part in twin.modules())
    twin(torch.ones(2, 4))
    assert uses.params() == []
