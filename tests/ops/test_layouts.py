"""What DLPack tells of tensors is what torch does: where they lie, or that one is not as it is expected to be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zeroopt.ops.layouts import Layouts, LayoutsByDLPack, LayoutsInPython

CPU = torch.device("cpu")
KINDS: list[Callable[..., Layouts]] = [
    LayoutsInPython,
    pytest.param(
        LayoutsByDLPack,
        marks=pytest.mark.skipif(not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="torch is older than 2.10"),
    ),  # type: ignore[list-item]
]


def _tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        torch.randn(5, 6).to(dtype),
        torch.randn(2, 4).to(dtype).t(),
        torch.randn(0).to(dtype),
        torch.randn(3).to(dtype)[1],  # a number, not the first one of its memory
        torch.randn(2, 3, 4, 5).to(dtype, memory_format=torch.channels_last),
        torch.randn(1, 1).to(dtype),
        nn.Parameter(torch.randn(3).to(dtype)),
    ]


def _layouts(kind: Callable[..., Layouts]) -> Layouts:
    return kind([tensor.shape for tensor in _tensors()], [tensor.stride() for tensor in _tensors()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_they_are_found(kind: Callable[..., Layouts], dtype: torch.dtype) -> None:
    layouts = _layouts(kind)
    for _ in range(2):
        tensors = _tensors(dtype)
        found = layouts.look(tensors, CPU)
        assert found is not None
        assert found[0].tolist() == [tensor.data_ptr() for tensor in tensors]
        assert found[1] is dtype


UNLIKE: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "shape": lambda tensors: [tensors[0].view(6, 5), *tensors[1:]],
    "dimensions": lambda tensors: [tensors[0].view(30), *tensors[1:]],
    "strides": lambda tensors: [tensors[0], tensors[1].contiguous(), *tensors[2:]],
    "two dtypes": lambda tensors: [tensors[0].half(), *tensors[1:]],
    "integers": lambda tensors: [tensor.detach().int() for tensor in tensors],
    "complex numbers": lambda tensors: [tensor.detach().to(torch.complex64) for tensor in tensors],
    "sparse": lambda tensors: [tensors[0].to_sparse(), *tensors[1:]],
    "without memory": lambda tensors: [tensor.to("meta") for tensor in tensors],
    "one less": lambda tensors: tensors[:-1],
    "one more": lambda tensors: [*tensors, tensors[0]],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_unlike_is_not(kind: Callable[..., Layouts], name: str) -> None:
    layouts = _layouts(kind)
    assert layouts.look(UNLIKE[name](_tensors()), CPU) is None
    assert layouts.look(_tensors(), CPU) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_elsewhere_they_are_not(kind: Callable[..., Layouts]) -> None:
    assert _layouts(kind).look(_tensors(), torch.device("cuda", 0)) is None
