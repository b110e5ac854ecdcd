"""The exact values of the parameters that this rank steps: where they are kept, and what the model has of them.

                     the model has        and beside it a rank keeps
    InPlace          the exact values     nothing. (16 bits without a master are as exact as they are kept, too.)
    Float32Master    them rounded         float32: the exact values
    Remainder        them rounded         int16: the bits that rounding to bfloat16 took away
    AheadOfModel     almost these         float32: the exact values, which the model follows by what codes tell of their changes

The rank steps them at home: the bucket's device, or another one with a copy of the parameters, which `publish` moves to the
bucket after a step, and `fetch` moves from there after somebody else has written it.

Whoever saves, loads, averages or steps parameters asks the `Master` of their bucket, and knows none of its kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..options.precision import Precision, join_master, round_master, split_master
from ..own_storage import with_own_storage
from ..pages import paged_zeros_like, release
from ..plan.params import ParamState
from .segment import Segment


class Master(ABC):
    """The exact values of the own range of one bucket. Elements are counted within that range.

    Attributes:
        name: what a state dict calls the array that completes the parameters; None where nothing does.
        is_stored: exact values are what lies in memory; they are not computed.
        param: [own range], the parameters as the model has them, at home.
        array: [own range], what completes them, at home; None where nothing does.
        is_away: home is not the bucket's device, so that parameters have to be moved.

    Args:
        in_bucket: [own range], the parameters in the bucket.
        home: where they are stepped.
    """

    name: ClassVar[str | None] = None
    is_stored: ClassVar[bool] = True

    def __init__(self, in_bucket: Tensor, home: torch.device, dtype: torch.dtype | None = None) -> None:
        self._in_bucket = in_bucket
        self.param: Tensor = in_bucket if home == in_bucket.device else paged_zeros_like(in_bucket, device=home)
        self.array: Tensor | None = None if dtype is None else paged_zeros_like(self.param, dtype)
        self.is_away: bool = self.param is not in_bucket

    @property
    def home(self) -> torch.device:
        """Where the exact values are, and are stepped."""
        return self.param.device

    def publish(self, begin: int = 0, end: int | None = None) -> None:
        """Let elements [begin, end) of the bucket be those at home."""
        if self.is_away:
            self._in_bucket[begin:end].copy_(self.param[begin:end])

    def fetch(self) -> None:
        """Let parameters at home be those of the bucket, which somebody else has written. What completes them stays."""
        if self.is_away:
            self.param.copy_(self._in_bucket)

    @property
    def kernel_arrays(self) -> tuple[Tensor, Tensor | None]:
        """[own range] each: what a fused kernel steps as the parameters, and what it takes for that which completes them."""
        return self.param, self.array

    def catch_up(self) -> None:
        """Exact values were written, and the bucket is about to travel as it is: let it have them."""

    @property
    def completes(self) -> bool:
        """Whether the exact values are more than what the model has."""
        return self.array is not None

    @property
    def nbytes(self) -> int:
        """Of what completes the parameters."""
        return 0 if self.array is None else self.array.nbytes

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the exact values."""

    @property
    @abstractmethod
    def stepped(self) -> Tensor:
        """[own range], what an optimizer's own step changes."""

    @abstractmethod
    def exact(self, begin: int = 0, end: int | None = None) -> Tensor:
        """The exact values of elements [begin, end), 1-D, of `dtype`; a view where they are stored."""

    @abstractmethod
    def round(self, values: Tensor) -> Tensor:
        """Exact values of any shape as the model has them; where they are kept as they come, the same tensor."""

    @abstractmethod
    def keep(self, begin: int, end: int, values: Tensor) -> None:
        """Let what completes elements [begin, end) be what rounding takes from exact values, 1-D. Parameters stay."""

    def write(self, begin: int, end: int, values: Tensor) -> None:
        """Set elements [begin, end), and what completes them, to exact values, 1-D; what `exact` gave may have been changed."""
        self.keep(begin, end, values)
        self.param[begin:end].copy_(self.round(values))
        self.publish(begin, end)

    def follow_writes(self, written: Sequence[Segment]) -> None:
        """Something other than a step may have written the parameters of these segments: let exact values follow."""
        self.fetch()

    def round_stepped(self) -> None:
        """Let parameters at home follow what an optimizer's own step has changed."""

    def arrays(self, segment: Segment) -> ParamState:
        """What completes a segment's parameters, by its name in a state dict, live; nothing where nothing does."""
        if self.name is None or self.array is None:
            return {}
        return {self.name: with_own_storage(segment.view_in(self.array))}

    def forget(self, segment: Segment) -> None:
        """It goes with the bucket."""

    def let_go(self) -> None:
        """What completes the parameters reads as zeros from now on."""
        if self.array is not None:
            release(self.array)

    def take(self, segment: Segment, arrays: ParamState) -> None:
        """Take what completes a segment's parameters out of its state, where it is in that."""
        if self.name in arrays and self.array is not None:
            segment.view_in(self.array).copy_(arrays.pop(self.name))


class InPlace(Master):
    """The parameters themselves. Exact values that are set are rounded to nearest where parameters are of fewer bits."""

    @property
    def dtype(self) -> torch.dtype:
        return self.param.dtype

    @property
    def stepped(self) -> Tensor:
        return self.param

    def exact(self, begin: int = 0, end: int | None = None) -> Tensor:
        return self.param[begin:end]

    def round(self, values: Tensor) -> Tensor:
        return values

    def keep(self, begin: int, end: int, values: Tensor) -> None:
        """Nothing is kept."""


class Float32Master(Master):
    """A float32 copy, of which 16-bit parameters are the rounded values."""

    name = "master_param"

    def __init__(self, in_bucket: Tensor, home: torch.device) -> None:
        super().__init__(in_bucket, home, torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def stepped(self) -> Tensor:
        assert self.array is not None
        return self.array

    def exact(self, begin: int = 0, end: int | None = None) -> Tensor:
        return self.stepped[begin:end]

    def round(self, values: Tensor) -> Tensor:
        return round_master(values, self.param.dtype)

    def keep(self, begin: int, end: int, values: Tensor) -> None:
        self.stepped[begin:end].copy_(values)

    def follow_writes(self, written: Sequence[Segment]) -> None:
        """Those exact values follow that the parameters are not the rounded values of, whichever way these were rounded."""
        self.fetch()
        master, param = self.stepped, self.param
        changed = (master.to(param.dtype) != param) & (self.round(master) != param)
        master[changed] = param[changed].float()

    def round_stepped(self) -> None:
        self.param.copy_(self.round(self.stepped))


class Remainder(Master):
    """The lower 16 bits of float32 values, of which bfloat16 parameters are the rounded values. Where something else writes
    the parameters, remainders stay: they are too small to matter."""

    name = "remainder"
    is_stored = False

    def __init__(self, in_bucket: Tensor, home: torch.device) -> None:
        super().__init__(in_bucket, home, torch.int16)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def stepped(self) -> Tensor:
        return self.param

    def write(self, begin: int, end: int, values: Tensor) -> None:
        assert self.array is not None
        rounded, remainders = split_master(values)
        self.param[begin:end].copy_(rounded)
        self.array[begin:end].copy_(remainders)
        self.publish(begin, end)

    def exact(self, begin: int = 0, end: int | None = None) -> Tensor:
        assert self.array is not None
        return join_master(self.param[begin:end], self.array[begin:end])

    def round(self, values: Tensor) -> Tensor:
        return round_master(values, self.param.dtype)

    def keep(self, begin: int, end: int, values: Tensor) -> None:
        assert self.array is not None
        self.array[begin:end].copy_(split_master(values)[1])


class AheadOfModel(Float32Master):
    """float32 values that the model's float32 parameters follow (`parameters.differences`): a step changes the exact ones alone.
    Where something else writes a parameter, its exact values begin anew from that; all others keep what codes have left out."""

    @property
    def kernel_arrays(self) -> tuple[Tensor, Tensor | None]:
        return self.stepped, None

    @property
    def difference(self) -> Tensor:
        """[own range], by how much the model has to change; new memory. What is infinite on both sides does not change."""
        return torch.where(self.stepped == self.param, 0.0, self.stepped - self.param)

    def catch_up(self) -> None:
        self.param.copy_(self.stepped)

    def round(self, values: Tensor) -> Tensor:
        return values

    def fetch(self) -> None:
        self.stepped.copy_(self.param)

    def follow_writes(self, written: Sequence[Segment]) -> None:
        for segment in written:
            segment.part_of(self.stepped).copy_(segment.part_of(self.param))

    def round_stepped(self) -> None:
        """The model follows when differences have travelled."""


MASTER_NAMES = ("master_param", "remainder")
"""What state dicts call that which completes parameters, whichever kind of master has saved it."""


def make_master(in_bucket: Tensor, precision: Precision, home: torch.device | None = None) -> Master:
    """The master of an own range, zeros where something completes the parameters.

    Args:
        in_bucket: [own range], the parameters in the bucket.
        home: where they are stepped; None: where they are.
    """
    if precision.parameter_compression is not None:
        return AheadOfModel(in_bucket, in_bucket.device if home is None else home)
    kinds: dict[torch.dtype | None, type[Float32Master | Remainder]] = {
        torch.float32: Float32Master,
        torch.int16: Remainder,
    }
    kind = kinds.get(precision.master_dtype(in_bucket.dtype))
    return (kind or InPlace)(in_bucket, in_bucket.device if home is None else home)


def exact_param(entry: Mapping[str, Any], rounded: Tensor) -> Tensor | None:
    """The float32 values of a segment's parameters, where its state, of whichever run, has what completes them.

    Args:
        rounded: the parameters as the model has them.
    """
    if Float32Master.name in entry:
        master: Tensor = entry[Float32Master.name]
        return master
    if Remainder.name in entry:
        remainder = entry[Remainder.name]
        return join_master(rounded.to(torch.bfloat16), remainder.view(rounded.shape))
    return None
