"""In what precision a wrapped model's parameters, gradients and state are kept, and how a float32 master is taken apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError, NotSupportedError
from .checks import check_one_of

# Where parameters, their gradients and their state begin: at multiples of so many bytes, as whatever torch's CPU allocator
# makes. Libraries of matrix multiplication (MKL) go other ways for operands that begin elsewhere, and add in another order:
# the same parameter would give other bits than under DistributedDataParallel, and others in another place of a bucket.
ALIGNMENT_BYTES = 64

_ALIGNMENT = ALIGNMENT_BYTES // 2  # elements: enough in every dtype of parameters and of their state, but for 8 bits

# Where slices cut a parameter, in elements. On the CPU torch's own loops take so many at a time, and the rest of an array one by
# one, which not all operations round alike: cut elsewhere, a step would give other bits. Devices compute each element alike; a
# thread of the kernels takes so many, and they have one random number.
_CUT_ON_CPU = _ALIGNMENT
_CUT_ON_DEVICES = 8


MASTER_WEIGHTS = ("float32", "remainder", "none")

CODE_BITS = {"int8": 8, "int4": 4}
"""Of the codes in which gradients, parameters and outer steps may travel, by their names in options."""


@dataclass(frozen=True)
class Precision:
    """The options `param_dtype`, `master_weights`, `state_dtype` and `parameter_compression` of `zeroopt.wrap`.

    Attributes:
        param_dtype: what parameters are cast to; None leaves them as they are.
        parameter_compression: in what codes differences of parameters travel; None: parameters travel as they are kept.

    Raises:
        ConfigError: there is no such precision.
    """

    param_dtype: torch.dtype | None = None
    master_weights: str = "float32"
    state_dtype: torch.dtype = torch.float32
    parameter_compression: str | None = None

    def __post_init__(self) -> None:
        check_one_of("param_dtype", self.param_dtype, (None, torch.bfloat16, torch.float16))
        check_one_of("master_weights", self.master_weights, MASTER_WEIGHTS)
        check_one_of("state_dtype", self.state_dtype, (torch.float32, torch.bfloat16, torch.int8))
        if self.master_weights != "float32" and self.param_dtype is not torch.bfloat16:
            raise ConfigError(
                f"master_weights={self.master_weights!r} completes or rounds bfloat16 parameters: it needs "
                f"param_dtype=torch.bfloat16, got {self.param_dtype}"
            )
        check_one_of("parameter_compression", self.parameter_compression, (None, *CODE_BITS))
        if self.parameter_compression is not None and self.param_dtype is not None:
            raise NotSupportedError(
                f"parameter_compression={self.parameter_compression!r} encodes differences of float32 parameters, got "
                f"param_dtype={self.param_dtype}; leave one of the two out"
            )

    @property
    def alignment(self) -> int:
        """Elements at whose multiples parameters begin."""
        return ops.QUANT_BLOCK if self.state_dtype is torch.int8 else _ALIGNMENT

    def slice_alignment(self, home: torch.device) -> int:
        """Elements at whose multiples slices may cut parameters; with 8-bit state, no two ranks share a block of it.

        Args:
            home: where they are stepped.
        """
        if self.state_dtype is torch.int8:
            return ops.QUANT_BLOCK
        return _CUT_ON_CPU if home.type in ("cpu", "meta") else _CUT_ON_DEVICES

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of a parameter of this dtype in its bucket."""
        return self.param_dtype or dtype

    def master_dtype(self, stored: torch.dtype) -> torch.dtype | None:
        """Of what completes a parameter of a bucket of this dtype; None where nothing does."""
        storage = self.storage(stored, stored)
        return None if storage is None else storage.master_dtype

    def sum_dtype(self, stored: torch.dtype, *, by_slices: bool) -> torch.dtype:
        """Of the sum of the gradients of such a bucket. Where ranks keep it by slices, it is as precise as the master."""
        return torch.float32 if self.param_dtype is not None and by_slices else stored

    def storage(self, stored: torch.dtype, grad_dtype: torch.dtype) -> ops.Storage | None:
        """How a fused kernel finds a bucket of this dtype; None where there is no kernel for it."""
        if stored is torch.float32:
            return ops.Storage(grad_dtype=grad_dtype, state_dtype=self.state_dtype)
        if self.param_dtype is None:
            return None
        return ops.Storage(stored, self.master_weights, grad_dtype, self.state_dtype)


def round_master(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of any dtype as 16-bit parameters, rounded as the kernels round a float32 master (see csrc/common/dtype.h)."""
    if dtype is torch.bfloat16:
        return split_master(values)[0]
    return values.to(dtype)


def split_master(values: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 parameters and the int16 remainders that together are float32 values."""
    if values.is_meta:  # where torch works out what each operation below would give, which takes it milliseconds
        return torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.int16)
    values = values.float().contiguous()
    bits = torch.where(values.isnan(), 0x7FC00000, values.view(torch.int32))
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), (bits & 0xFFFF).to(torch.int16)


def join_master(rounded: Tensor, remainders: Tensor) -> Tensor:
    """The float32 values of which these are the parts."""
    low = remainders.to(torch.int32) & 0xFFFF
    bits = rounded.contiguous().view(torch.int16).to(torch.int32)
    rounded_up = torch.where(bits & 0x7FFF == 0, 0, low >> 15)  # nothing rounds up to zero
    return ((bits - rounded_up << 16) | low).view(torch.float32)
