"""How the arrays of a step are stored: the tiers of precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .checks import DTYPE_CODES

QUANT_BLOCK = 256
"""Elements of an 8-bit array that share a scale."""

SCALE_SUFFIX = "_scale"
"""What the name of an array of scales ends with, after the name of its state."""

# (dtype of the parameter, what completes it) -> ParamFormat of csrc/kernels.h
_PARAM_FORMATS = {
    (torch.float32, "float32"): 0,
    (torch.bfloat16, "float32"): 1,
    (torch.float16, "float32"): 2,
    (torch.bfloat16, "remainder"): 3,
    (torch.bfloat16, "none"): 4,
}
_GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STATE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


@dataclass(frozen=True)
class Storage:
    """The precision of parameters, gradients and moments. A step computes in float32 whatever it is.

    Attributes:
        param_dtype: float32, bfloat16 or float16.
        master_weights: what a 16-bit parameter is kept with. "float32": a float32 master, from which it is rounded to nearest
            (bfloat16: ties away from zero). "remainder": the 16 bits that complete a bfloat16 to that very master. "none": a
            bfloat16 alone, rounded stochastically. A float32 parameter is its own master, and this is "float32".
        grad_dtype: float32, bfloat16 or float16.
        state_dtype: of the moments: float32, bfloat16 (rounded stochastically), or int8 (codes of 8 bits and a float32 scale
            for every 256 elements; second moments are kept as uint8 and rounded stochastically).

    Raises:
        ConfigError: there is no such combination.
    """

    param_dtype: torch.dtype = torch.float32
    master_weights: str = "float32"
    grad_dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if (self.param_dtype, self.master_weights) not in _PARAM_FORMATS:
            choices = ", ".join(f"{dtype} with {weights!r}" for dtype, weights in _PARAM_FORMATS)
            raise ConfigError(
                f"expected parameters and master_weights to be one of {choices}, "
                f"got {self.param_dtype} with {self.master_weights!r}"
            )
        if self.grad_dtype not in _GRAD_DTYPES:
            raise ConfigError(f"expected gradients of float32, bfloat16 or float16, got {self.grad_dtype}")
        if self.state_dtype not in _STATE_FORMATS:
            raise ConfigError(f"expected state_dtype to be float32, bfloat16 or int8, got {self.state_dtype}")

    @property
    def codes(self) -> tuple[int, int, int]:
        """The three formats as csrc/kernels.h numbers them."""
        param = _PARAM_FORMATS[self.param_dtype, self.master_weights]
        return param, DTYPE_CODES[self.grad_dtype], _STATE_FORMATS[self.state_dtype]

    @property
    def master_dtype(self) -> torch.dtype | None:
        """Of the array that completes a parameter; None where there is none."""
        if self.param_dtype is torch.float32 or self.master_weights == "none":
            return None
        return torch.float32 if self.master_weights == "float32" else torch.int16

    @property
    def has_scales(self) -> bool:
        """Whether an array of state comes with an array of scales."""
        return self.state_dtype is torch.int8

    @property
    def is_stochastic(self) -> bool:
        """Whether something is rounded stochastically, so that a step depends on its number."""
        return self.master_weights == "none" or self.state_dtype is not torch.float32

    def dtype_of_state(self, *, signed: bool) -> torch.dtype:
        """Of an array of state that can be negative, or cannot."""
        return torch.uint8 if self.has_scales and not signed else self.state_dtype


def num_blocks(numel: int) -> int:
    """Scales that an 8-bit array of so many elements has."""
    return -(-numel // QUANT_BLOCK)
