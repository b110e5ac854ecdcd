"""A parameter that zeroopt trains: its name, its place in a bucket, and how its elements lie there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import lies_as
from ..own_storage import with_own_storage
from .regions import FlatLayout

# A state entry of a parameter, as torch keeps it: "exp_avg" -> tensor, "step" -> 0-dim tensor, …
ParamState = dict[str, Any]


class Grain(IntEnum):
    """The smallest piece of a parameter that its optimizer can step by itself."""

    ELEMENT = 0
    PARAMETER = 1
    MATRIX = 2
    """The whole parameter, and it must be a matrix: the step multiplies matrices or factors them."""


@dataclass(eq=False)
class ManagedParam:
    """A parameter that zeroopt trains: what its name is, and where it lies.

    Attributes:
        index: position among the managed parameters, in the order of `model.named_parameters()`.
        group: position of its param_group in the optimizer.
        position: position in the optimizer, counted over all groups, as in a torch optimizer's state dict.
        grain: whether ranks may share its step. If not, it lies whole in one rank's slice.
        shape, stride, numel: of the part of it that every rank of the data-parallel group holds, which is the whole
            parameter unless it is a DTensor; see `plan.dtensors`. All methods are about that part.
        part_sizes, part_dim: of the parts that are stepped each as a parameter of its own, and along which dimension they lie; none:
            it is stepped as it is.
        copies: ranks outside of the data-parallel group, and this one, that hold the same elements.
    """

    name: str
    param: nn.Parameter
    index: int
    group: int
    position: int
    grain: Grain = Grain.ELEMENT
    offset: int = field(default=-1, init=False)
    part_sizes: list[int] = field(default_factory=list, init=False)
    part_dim: int = field(default=0, init=False)
    copies: int = field(default=1, init=False)
    shape: torch.Size = field(init=False)
    stride: tuple[int, ...] = field(init=False)
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.shape = self.local.shape
        self.stride = self.local.stride()
        self.numel = self.local.numel()

    @property
    def local(self) -> Tensor:
        """The parameter's elements on this rank, a tensor without gradient."""
        return self.param.data

    @property
    def has_memory(self) -> bool:
        """Whether it has elements to be read; one that was on the meta device gets them in its bucket."""
        return self.numel == 0 or self.local.untyped_storage().nbytes() > 0

    def set_local(self, view: Tensor) -> None:
        """Let the parameter's elements be those of `view`, which may be of another dtype."""
        self.param.data = with_own_storage(view)

    @property
    def address(self) -> Callable[[], int]:
        """A function that tells where the parameter's elements begin, and goes on doing so when they move."""
        return self.param.data_ptr

    def local_grad(self) -> Tensor | None:
        """This rank's part of `param.grad`."""
        return self.param.grad

    def set_local_grad(self, view: Tensor) -> None:
        """Let this rank's part of `param.grad` be `view`."""
        self.param.grad = view

    def layout_like(self, local: Tensor) -> Tensor:
        """A tensor of the parameter's global shape and placements from this rank's part."""
        return local

    def aligned(self, grad: Tensor) -> Tensor:
        """This rank's part of a gradient that autograd gives. Collective in the mesh of a DTensor that is not cut as the
        parameter is."""
        return grad

    def align_gradients(self) -> None:
        """From now on, let gradients arrive cut as the parameter is. To be called before other hooks are registered."""

    def local_part(self, value: Tensor) -> Tensor:
        """This rank's part of a tensor that belongs to the parameter, such as a moment of its optimizer.

        Raises:
            StateError: it is cut in another way than the parameter.
        """
        return value

    @property
    def is_whole(self) -> bool:
        """Whether one rank steps all of it, in its own shape."""
        return self.grain is not Grain.ELEMENT

    @property
    def whole_cost(self) -> int | None:
        """What it costs to step it whole, in comparison with others; None where it is not.

        Its number of elements, and for matrices times the smaller side, as for the products of Newton-Schulz iterations
        (what has more dimensions counts as a matrix of its first one by the rest). Of parts, the sum.
        """
        if not self.is_whole:
            return None
        if self.grain is Grain.PARAMETER or len(self.shape) < 2 or self.numel == 0:
            return self.numel
        if not self.part_sizes:
            return _cost_of_matrix(self.shape)
        before, after = self.shape[: self.part_dim], self.shape[self.part_dim + 1 :]
        return sum(_cost_of_matrix((*before, size, *after)) for size in self.part_sizes)

    @property
    def is_stepped_in_parts(self) -> bool:
        """Whether it is, and whoever steps it has to know."""
        return self.is_whole and bool(self.part_sizes)

    @property
    def flat_layout(self) -> FlatLayout:
        """In which order its elements lie in the bucket, and where they are in the whole of a DTensor."""
        return FlatLayout.of(self.shape, self.stride)

    def view_in(self, full: Tensor) -> Tensor:
        """The parameter's shape (and memory format) over its range of a flat buffer of its bucket."""
        return full.as_strided(self.shape, self.stride, full.storage_offset() + self.offset)

    def flatten(self, value: Tensor) -> Tensor:
        """Elements of a tensor of the parameter's shape in the order in which they lie in the bucket, 1-D."""
        if not lies_as(value, self.stride):
            value = torch.empty_strided(self.shape, self.stride, dtype=value.dtype, device=value.device).copy_(value)
        return value.as_strided((self.numel,), (1,))


def _cost_of_matrix(shape: Sequence[int]) -> int:
    numel, rows = prod(shape), shape[0]
    return numel * min(rows, numel // rows)
