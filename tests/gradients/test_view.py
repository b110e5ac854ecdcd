"""A gradient has its elements in memory as those of its parameter are, whatever autograd made of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zeroopt.errors import StateError
from zeroopt.gradients.view import GradientView, dense
from zeroopt.plan.params import ManagedParam

LAYOUTS = {
    "rows": torch.arange(6.0).view(2, 3),
    "columns": torch.arange(6.0).view(3, 2).t(),
    "channels_last": torch.arange(48.0).view(2, 2, 3, 4).to(memory_format=torch.channels_last),
    "scalar": torch.tensor(1.0),
    "empty": torch.zeros(0, 3),
}


def managed(values: Tensor) -> ManagedParam:
    return ManagedParam("p", nn.Parameter(values.clone(memory_format=torch.preserve_format)), 0, 0, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_as_the_parameter_is_taken_as_it_is(layout: str) -> None:
    param = managed(LAYOUTS[layout])
    grad = LAYOUTS[layout].clone(memory_format=torch.preserve_format)
    assert dense(param, grad) is grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_else_is_laid_out_anew(layout: str, dtype: torch.dtype) -> None:
    param = managed(LAYOUTS[layout])
    values = torch.randn(param.shape, dtype=dtype)
    for grad in (values.contiguous(), values.sum().expand(param.shape), values.flip(0) if values.dim() else values):
        laid_out = dense(param, grad)
        assert laid_out.stride() == param.stride and laid_out.dtype is dtype
        assert torch.equal(laid_out, grad)


def test_a_gradient_whose_strides_differ_where_there_is_one_element_is_taken_as_it_is() -> None:
    param = managed(torch.zeros(64, 3, 1, 1))
    grad = torch.randn(64, 3, 1, 1).to(memory_format=torch.channels_last)
    assert grad.stride() != param.stride
    assert dense(param, grad) is grad


def test_a_tensor_that_torch_only_calls_negative_is_made_so() -> None:
    values = torch.randn(3)
    grad = torch._neg_view(values)
    laid_out = dense(managed(torch.zeros(3)), grad)
    assert not laid_out.is_neg() and torch.equal(laid_out, -values)
    assert laid_out.as_strided((3,), (1,)).tolist() == (-values).tolist()


def test_a_sparse_gradient_is_refused_by_name() -> None:
    with pytest.raises(StateError, match="parameter 'p' has a sparse gradient, .*sparse=False"):
        dense(managed(torch.zeros(3, 3)), torch.eye(3).to_sparse())


def test_a_view_has_to_be_of_a_stage() -> None:
    with pytest.raises(TypeError, match="abstract"):
        GradientView()  # type: ignore[abstract]
