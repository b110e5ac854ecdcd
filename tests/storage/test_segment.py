"""A segment finds its elements in any array over the own range of its bucket."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zeroopt.plan.params import Grain, ManagedParam
from zeroopt.storage.segment import Segment, view_of


def segment_of(value: Tensor, grain: Grain, offset: int, start: int = 0, numel: int | None = None) -> Segment:
    owner = ManagedParam("p", nn.Parameter(value), 0, 0, 0, grain)
    numel = owner.numel - start if numel is None else numel
    return Segment(owner, start, offset, numel, nn.Parameter(torch.zeros(numel)), torch.float32)


@pytest.mark.parametrize("numel", [0, 1, 7])
def test_a_part_is_one_dimensional_and_a_view(numel: int) -> None:
    own = torch.arange(20.0)
    segment = segment_of(torch.zeros(3, 4), Grain.ELEMENT, 6, 2, numel)
    assert segment.range == (6, 6 + numel)
    for part in (segment.part_of(own), segment.view_in(own)):
        assert part.tolist() == list(range(6, 6 + numel))
        assert part.data_ptr() == own[6:].data_ptr() or numel == 0
    assert segment.flatten(torch.ones(numel)).shape == (numel,)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(()),
        torch.zeros(3, 4),
        torch.zeros(3, 4).t(),
        torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    ],
    ids=lambda value: str(list(value.stride())),
)
def test_a_whole_parameter_keeps_its_shape_and_memory_format(value: Tensor) -> None:
    own = torch.arange(100.0)[3:]  # a view, which begins somewhere in its storage
    segment = segment_of(value, Grain.PARAMETER, 5)
    view = segment.view_in(own)
    assert view.shape == value.shape and view.stride() == value.stride()
    assert view.data_ptr() == own[5:].data_ptr()
    assert torch.equal(segment.flatten(view), segment.part_of(own))
    assert torch.equal(segment.flatten(view.contiguous()), segment.part_of(own)), "values of any strides"
    assert torch.equal(view, view_of(own, segment.owner, 5, value.numel()))
