"""Typed functions over the compiled kernels: Python checks, C++ computes.

Every function works on this process's own tensors, on the CPU or on one CUDA device; none is collective. On the CPU
kernels run on ``torch.get_num_threads()`` threads, on CUDA they are queued on the device's current stream. They write
through addresses, behind autograd's back: call them where gradients are not recorded. `csrc/kernels.h` states what each one
moves and computes. For tensors on other devices, and on CUDA where the build has no kernels for them, what `move` has goes by torch's
operations, and the rest raises `KernelUnavailableError`.

In reading order; each imports from those above it:

    checks    of arguments, in one wording
    devices   for which there are kernels
    storage   how the arrays of a step are stored: the tiers of precision
    segments  the arrays that a step works on
    by_torch  what move and exact_sum do, for devices without kernels
    move      cast and scale, copy, sum
    layouts   where tensors lie that come again and again
    pack_table  cast and scale, of arrays that come again and again
    exact_sum  sums that are the same in any order
    quantize  8-bit codes with a scale for every 256 elements
    wire_code  8- and 4-bit codes with a step for every 256 elements, for what travels
    steps     one step of an optimizer over all segments of a table
"""

from .checks import DTYPE_CODES
from .devices import has_kernels, missing_kernels
from .exact_sum import SUM_PARTS, sum_in_parts
from .move import copy, pack, pack_segments, reduce
from .pack_table import PackTable
from .quantize import dequantize, encode_again, quantize, requantize
from .segments import SegmentArrays, SegmentTable
from .steps import (
    MOMENTS,
    OPTIMIZERS,
    SCALES,
    StepControl,
    StepKernel,
    adagrad,
    adamw,
    lamb,
    lion,
    sgd,
    squared_norms,
)
from .storage import QUANT_BLOCK, SCALE_SUFFIX, Storage, num_blocks
from .wire_code import WIRE_DTYPES, encode_slices, encoded_bytes, sum_encoded

__all__ = [
    "DTYPE_CODES",
    "MOMENTS",
    "OPTIMIZERS",
    "QUANT_BLOCK",
    "SCALES",
    "SCALE_SUFFIX",
    "SUM_PARTS",
    "WIRE_DTYPES",
    "PackTable",
    "SegmentArrays",
    "SegmentTable",
    "StepControl",
    "StepKernel",
    "Storage",
    "adagrad",
    "adamw",
    "copy",
    "dequantize",
    "encode_again",
    "encode_slices",
    "encoded_bytes",
    "has_kernels",
    "lamb",
    "lion",
    "missing_kernels",
    "num_blocks",
    "pack",
    "pack_segments",
    "quantize",
    "reduce",
    "requantize",
    "sgd",
    "squared_norms",
    "sum_encoded",
    "sum_in_parts",
]
