"""Arrays as they travel between ranks: 8- or 4-bit codes with a step for every 256 elements, rounded stochastically.

csrc/common/wire_code.h has the code, its layout and its source. Whoever encodes may keep a residual, what codes have left out so
far, and add it to what is encoded next (error feedback: Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847): the sum of all
that has been decoded is then the sum of all values, but for the last residual.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from .checks import DTYPE_CODES, check_device, check_disjoint, check_flat, current_stream, require
from .devices import require_kernels
from .move import reduce

WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of what can be encoded, and of sums of it."""

_ALIGNMENT_BYTES = 16
_MOST_SLICES = 256  # that one launch takes on CUDA, a power of two


def encoded_bytes(numel: int, bits: int) -> int:
    """How many bytes a slice of so many elements travels in, a multiple of 16.

    Args:
        bits: of a code, 8 or 4.
    """
    _check_bits(bits)
    return _C.encoded_bytes(numel, bits)


def encode_slices(
    values: Tensor,
    encoded: Tensor,
    *,
    num_slices: int,
    bits: int,
    seed: int,
    step: int,
    key: int = 0,
    residual: Tensor | None = None,
) -> None:
    """``encoded = codes of (values + residual)``, and ``residual = values + residual - what comes out``. Not collective.

    A value comes out as one of the two whole numbers of steps beside it, on average as itself; a step is the largest magnitude of the
    block of 256 elements divided by 127, or by 7. A block in which something is not finite comes out as NaN, and its residual stays
    as it is. So do, with a step of 0, blocks of magnitudes below 2**-118, whose residual keeps them.

    Args:
        values: [num_slices * n], contiguous, float32, bfloat16 or float16.
        encoded: uint8, [num_slices * encoded_bytes(n, bits)], contiguous, at a multiple of 16 bytes; overwritten.
        num_slices: equally long ones, each of which can be decoded by itself.
        bits: of a code, 8 or 4.
        seed, step, key: whose random numbers, below 2**64, 2**32 and 2**32. The same ones round in the same way: they have to differ
            from rank to rank, from step to step, and from one array to another.
        residual: bfloat16, as many as `values`; None: nothing is added or kept.

    Raises:
        ConfigError: a dtype, size, layout or device does not fit, or tensors overlap.
        KernelUnavailableError: there are no kernels for the device.
    """
    _check_bits(bits)
    require(num_slices > 0, f"expected num_slices to be positive, got {num_slices}")
    require(values.dtype in WIRE_DTYPES, f"expected values to be float32, bfloat16 or float16, got {values.dtype}")
    numel = values.numel()
    require(numel % num_slices == 0, f"expected values to be {num_slices} equally long slices, got {numel} elements")
    require(
        0 <= seed < 2**64 and 0 <= step < 2**32 and 0 <= key < 2**32,
        f"expected seed, step and key below 2**64, 2**32 and 2**32, got {seed}, {step} and {key}",
    )
    check_flat("values", values, numel)
    _check_encoded("encoded", encoded, num_slices * encoded_bytes(numel // num_slices, bits), values)
    check_disjoint("values", values, "encoded", encoded)
    if residual is not None:
        require(residual.dtype is torch.bfloat16, f"expected residual to be bfloat16, got {residual.dtype}")
        check_flat("residual", residual, numel)
        check_device("residual", residual, values)
        check_disjoint("values", values, "residual", residual)
        check_disjoint("encoded", encoded, "residual", residual)
    require_kernels(values.device)
    left = 0 if residual is None else residual.data_ptr()
    arguments = (values.data_ptr(), DTYPE_CODES[values.dtype], left, encoded.data_ptr(), numel // num_slices)
    if values.is_cpu:
        _C.encode_slices(*arguments, num_slices, bits, seed, step, key, torch.get_num_threads())
        return
    with torch.cuda.device(values.device):
        _C.cuda_encode_slices(*arguments, num_slices, bits, seed, step, key, current_stream(values))


def sum_encoded(slices: Sequence[Tensor], out: Tensor, *, bits: int, base: Tensor | None = None) -> None:
    """``out = base + (slices[0] + slices[1] + ...)`` of encoded slices, summed in float32 as `reduce` does it. Not collective.

    Args:
        slices: at least one, uint8, [encoded_bytes(n, bits)], contiguous, at multiples of 16 bytes.
        out: [n], contiguous, float32, bfloat16 or float16. It may be ``base``.
        bits: of a code, 8 or 4.
        base: of the size and dtype of ``out``, added to the sum; None for nothing.

    Raises:
        ConfigError: a dtype, size, layout or device does not fit, or tensors overlap.
        KernelUnavailableError: there are no kernels for the device.
    """
    require(len(slices) > 0, "expected slices to hold at least one tensor, got none")
    require(out.dtype in WIRE_DTYPES, f"expected out to be float32, bfloat16 or float16, got {out.dtype}")
    numel = out.numel()
    check_flat("out", out, numel)
    num_bytes = encoded_bytes(numel, bits)
    for number, encoded in enumerate(slices):
        _check_encoded(f"slices[{number}]", encoded, num_bytes, out)
        check_disjoint(f"slices[{number}]", encoded, "out", out)
    if base is not None:
        require(base.dtype is out.dtype, f"expected base to be {out.dtype} as out, got {base.dtype}")
        check_flat("base", base, numel)
        check_device("base", base, out)
        if base.data_ptr() != out.data_ptr():
            check_disjoint("base", base, "out", out)
    require_kernels(out.device)
    if not out.is_cpu and len(slices) > _MOST_SLICES:
        groups = [slices[first : first + _MOST_SLICES] for first in range(0, len(slices), _MOST_SLICES)]
        reduce([_sum_apart(group, out, bits) for group in groups], out, base=base)
        return
    addresses = [encoded.data_ptr() for encoded in slices]
    arguments = (addresses, bits, 0 if base is None else base.data_ptr(), out.data_ptr(), DTYPE_CODES[out.dtype], numel)
    if out.is_cpu:
        _C.sum_encoded(*arguments, torch.get_num_threads())
        return
    with torch.cuda.device(out.device):
        _C.cuda_sum_encoded(*arguments, current_stream(out))


def _sum_apart(slices: Sequence[Tensor], like: Tensor, bits: int) -> Tensor:
    total = torch.empty_like(like, dtype=torch.float32)
    sum_encoded(slices, total, bits=bits)
    return total


def _check_bits(bits: int) -> None:
    require(bits in (4, 8), f"expected codes of 4 or 8 bits, got {bits!r}")


def _check_encoded(name: str, encoded: Tensor, num_bytes: int, other: Tensor) -> None:
    require(encoded.dtype is torch.uint8, f"expected {name} to be uint8, got {encoded.dtype}")
    check_flat(name, encoded, num_bytes)
    check_device(name, encoded, other)
    require(encoded.data_ptr() % _ALIGNMENT_BYTES == 0, f"expected {name} to begin at a multiple of 16 bytes")
