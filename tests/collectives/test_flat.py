"""What is grouped by dtype and put into one flat tensor is found again, in the shapes it had."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zeroopt.collectives.flat import group_alike, pieces_of

shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=6)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64])


def numbered(all_shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Tensors that differ in all their elements."""
    ends = torch.tensor([0, *(torch.Size(shape).numel() for shape in all_shapes)]).cumsum(0).tolist()
    return [
        torch.arange(float(first), float(last)).view(shape)
        for shape, first, last in zip(all_shapes, ends, ends[1:], strict=False)
    ]


@given(st.lists(dtypes, max_size=8))
def test_those_of_one_dtype_come_together_and_keep_their_order(kinds: list[torch.dtype]) -> None:
    tensors = [torch.zeros(2, dtype=kind) for kind in kinds]
    expected = [[id(tensor) for tensor in tensors if tensor.dtype is kind] for kind in dict.fromkeys(kinds)]
    assert [[id(tensor) for tensor in alike] for alike in group_alike(tensors)] == expected


def test_those_on_different_devices_stay_apart() -> None:
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    assert group_alike([here, there]) == [[here], [there]]


@given(shapes)
def test_pieces_are_what_was_put_together(all_shapes: list[tuple[int, ...]]) -> None:
    tensors = numbered(all_shapes)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.zeros(0)
    pieces = pieces_of(flat, tensors)
    assert len(pieces) == len(tensors)
    for piece, tensor in zip(pieces, tensors, strict=True):
        assert torch.equal(piece, tensor)


def test_pieces_are_views() -> None:
    flat = torch.zeros(5)
    first, second = pieces_of(flat, [torch.empty(2, 2).t(), torch.empty(())])
    first.fill_(1)
    second.fill_(2)
    assert flat.tolist() == [1, 1, 1, 1, 2]
