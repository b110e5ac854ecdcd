"""A parameter that is about to move shares memory with nothing that stays, and no element is two; else both are named."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zeroopt.admission.memory_overlap import check_expanded, check_overlaps
from zeroopt.errors import ConfigError
from zeroopt.plan.params import ManagedParam


class Part(NamedTuple):
    """Elements [begin, end) of some memory that a model has in common."""

    begin: int
    end: int
    kind: str


parts = st.builds(
    lambda begin, numel, kind: Part(begin, begin + numel, kind),
    st.integers(0, 30),
    st.integers(0, 8),
    st.sampled_from(["moves", "frozen", "buffer"]),
)


def model_of(**tensors: Tensor) -> nn.Module:
    """What are parameters become such, and all else buffers."""
    model = nn.Module()
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            model.register_parameter(name, tensor)
        else:
            model.register_buffer(name, tensor)
    return model


def check(model: nn.Module) -> None:
    """What requires gradients is about to move."""
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    check_overlaps(model, [ManagedParam(name, param, i, 0, i) for i, (name, param) in enumerate(trained)])


def refused(expected: str, **tensors: Tensor) -> None:
    with pytest.raises(
        ConfigError, match=f"^{expected} share memory, out of which trained parameters move; to tie them"
    ):
        check(model_of(**tensors))


@given(st.lists(parts, max_size=6))
def test_whatever_would_be_untied_is_found(cut: list[Part]) -> None:
    memory = torch.zeros(40)
    tensors = {
        f"p{i}": memory[part.begin : part.end]
        if part.kind == "buffer"
        else nn.Parameter(memory[part.begin : part.end], requires_grad=part.kind == "moves")
        for i, part in enumerate(cut)
    }
    overlaps = any(
        max(one.begin, other.begin) < min(one.end, other.end) and "moves" in (one.kind, other.kind)
        for one, other in combinations(cut, 2)
    )
    if overlaps:
        with pytest.raises(ConfigError, match="share memory"):
            check(model_of(**tensors))
    else:
        check(model_of(**tensors))


def test_two_parameters_over_the_same_elements_are_named() -> None:
    memory = torch.zeros(8)
    refused("parameter 'a' and parameter 'b'", a=nn.Parameter(memory), b=nn.Parameter(memory[:2]))


def test_a_frozen_one_tied_to_a_transpose_is_found() -> None:
    weight = torch.zeros(3, 4)
    frozen = nn.Parameter(weight.t(), requires_grad=False)
    refused("parameter 'weight' and parameter 'frozen'", weight=nn.Parameter(weight), frozen=frozen)


def test_a_buffer_over_a_parameter_is_found() -> None:
    weight = torch.zeros(3, 4)
    refused("parameter 'weight' and buffer 'table'", weight=nn.Parameter(weight), table=weight)


def test_a_long_tensor_is_not_forgotten_behind_a_short_one() -> None:
    memory = torch.zeros(30)
    refused("buffer 'long' and parameter 'p'", long=memory, short=memory[:4], p=nn.Parameter(memory[10:18]))


def test_what_lies_in_gaps_counts() -> None:
    memory = torch.zeros(4, 6)
    refused("buffer 'left' and parameter 'right'", left=memory[:, :3], right=nn.Parameter(memory[1:2, 3:]))


def test_neighbours_share_nothing() -> None:
    memory = torch.zeros(4, 6)
    check(model_of(first=nn.Parameter(memory[:2]), second=nn.Parameter(memory[2:3]), third=memory[3:]))


def test_one_parameter_in_two_modules_is_tied_as_it_should_be() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Linear(3, 3, bias=False))
    model[1].weight = layer.weight
    check(model)


def test_elements_of_other_sizes_are_counted_in_bytes() -> None:
    memory = torch.zeros(8, dtype=torch.float64)
    halves = memory.view(torch.float16)
    check(model_of(p=nn.Parameter(memory[:2]), rest=halves[8:]))
    refused("parameter 'p' and buffer 'rest'", p=nn.Parameter(memory[:2]), rest=halves[7:])


def test_what_has_no_memory_yet_shares_none() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta"))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("meta", torch.ones(1, device="meta").expand(8))
    check(model)
    check_expanded(model)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_an_expanded_parameter_is_named(requires_grad: bool) -> None:
    bias = nn.Parameter(torch.ones(1).expand(2), requires_grad=requires_grad)
    with pytest.raises(
        ConfigError, match=r"^parameter 'bias' of shape \[2\] is expanded: .* give the model a clone\(\)"
    ):
        check_expanded(model_of(bias=bias))


def test_an_expanded_buffer_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^buffer 'ones' of shape \[3, 8\] is expanded"):
        check_expanded(model_of(ones=torch.ones(3, 1).expand(3, 8)))


def test_strides_that_do_not_matter_are_not_expanded() -> None:
    """Of one element, or of none."""
    check_expanded(
        model_of(one=torch.ones(()).expand(1, 1), none=torch.ones(1).expand(0), empty=torch.ones(1, 0).expand(4, 0))
    )
    check_expanded(nn.Linear(2, 2))
