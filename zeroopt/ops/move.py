"""Kernels that move data: cast and scale, copy, sum. On devices without kernels torch's operations do the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..errors import ConfigError
from . import by_torch
from .checks import (
    DTYPE_CODES,
    GRAD_COLUMN,
    NUMEL_COLUMN,
    PARAM_COLUMN,
    ROW_COLUMNS,
    check_device,
    check_disjoint,
    check_flat,
    check_none_overlap,
    check_not_negated,
    current_stream,
    dtype_code,
    is_dense,
    lies_as,
    require,
)
from .devices import has_kernels


def pack(src: Tensor, dst: Tensor, *, scale: float = 1.0) -> None:
    """``dst = src * scale``, cast, element by element in storage order. Not collective.

    Args:
        src: float32, float64, bfloat16 or float16, contiguous or dense with the strides of ``dst``. A negated view is resolved.
        dst: as many elements of any of these dtypes, on the same device; overwritten. It may be ``src`` itself.
        scale: factor; multiplied in float32, or in float64 when either side is.

    Raises:
        ConfigError: a dtype, size, layout or device does not fit, or the two overlap in part.
    """
    src = _resolved(src)
    src_code, dst_code = dtype_code("src", src), dtype_code("dst", dst)
    check_device("dst", dst, src)
    require(src.numel() == dst.numel(), f"expected dst to have {src.numel()} elements as src, got {dst.numel()}")
    require(
        _same_dense_layout(src, dst),
        f"expected src and dst to be contiguous or dense with the same strides, got strides {src.stride()} of shape "
        f"{list(src.shape)} and {dst.stride()} of shape {list(dst.shape)}; call .contiguous() first",
    )
    if src.data_ptr() != dst.data_ptr() or src_code != dst_code:
        check_disjoint("src", src, "dst", dst)
    numel = src.numel()
    if src.is_cpu:
        _C.pack(src.data_ptr(), src_code, dst.data_ptr(), dst_code, numel, scale, torch.get_num_threads())
        return
    if not has_kernels(src.device):
        by_torch.pack(src, dst, scale)
        return
    with torch.cuda.device(src.device):
        _C.cuda_pack(src.data_ptr(), src_code, dst.data_ptr(), dst_code, numel, scale, current_stream(src))


def pack_segments(sources: Sequence[Tensor], targets: Sequence[Tensor], *, scale: float = 1.0) -> None:
    """`pack` for many pairs of tensors in one call. Not collective. A CUDA graph that captures it packs these very tensors.

    Args:
        sources: of one dtype and device; each contiguous or dense with the strides of its target. Negated views are resolved.
        targets: likewise, as many, each with as many elements as its source; overwritten. One may be its source itself; else
            none overlaps another tensor.
        scale: factor; multiplied in float32, or in float64 when either side is.

    Raises:
        ConfigError: a dtype, size, layout or device does not fit, or tensors overlap.
    """
    require(len(sources) == len(targets), f"expected as many targets as the {len(sources)} sources, got {len(targets)}")
    pairs = [(_resolved(s), t) for s, t in zip(sources, targets, strict=True) if s.numel() or t.numel()]
    if not pairs:
        return
    first_src, first_dst = pairs[0]
    src_code, dst_code = dtype_code("sources[0]", first_src), dtype_code("targets[0]", first_dst)
    rows = torch.zeros(len(pairs), ROW_COLUMNS, dtype=torch.int64, device="cpu")
    table = rows.numpy()
    for number, (src, dst) in enumerate(pairs):
        if src.dtype is not first_src.dtype or dst.dtype is not first_dst.dtype or src.numel() != dst.numel():
            raise ConfigError(
                f"expected pair {number} to be {src.numel()} elements of {first_src.dtype} and of {first_dst.dtype}, got "
                f"{src.numel()} of {src.dtype} and {dst.numel()} of {dst.dtype}"
            )
        check_device(f"targets[{number}]", dst, first_src)
        check_device(f"sources[{number}]", src, first_src)
        check_not_negated(f"targets[{number}]", dst)
        if not _same_dense_layout(src, dst):
            raise ConfigError(f"expected pair {number} to be contiguous or dense with the same strides")
        table[number, [NUMEL_COLUMN, PARAM_COLUMN, GRAD_COLUMN]] = src.numel(), dst.data_ptr(), src.data_ptr()
    check_none_overlap(
        (f"pair {number}", tensor)
        for number, (src, dst) in enumerate(pairs)
        for tensor in ((src,) if src.data_ptr() == dst.data_ptr() and src_code == dst_code else (src, dst))
    )
    active = torch.ones(len(pairs), dtype=torch.uint8, device="cpu")
    arguments = (rows.data_ptr(), active.data_ptr(), len(pairs), src_code, dst_code, scale)
    if first_src.is_cpu:
        _C.pack_segments(*arguments, torch.get_num_threads())
        return
    if not has_kernels(first_src.device):
        for src, dst in pairs:
            by_torch.pack(src, dst, scale)
        return
    with torch.cuda.device(first_src.device):
        _C.cuda_pack_segments(*arguments, current_stream(first_src))


def copy(src: Tensor, dst: Tensor) -> None:
    """``dst = src``, for what this processor does not read again soon: large copies go past its cache. CPU; not collective.

    Args:
        src: contiguous.
        dst: as many bytes, contiguous; overwritten.

    Raises:
        ConfigError: a size, layout or device does not fit, or the two overlap.
    """
    require(src.is_cpu and dst.is_cpu, f"expected src and dst on the CPU, got {src.device} and {dst.device}")
    require(src.is_contiguous() and dst.is_contiguous(), "expected src and dst to be contiguous")
    for name, tensor in (("src", src), ("dst", dst)):
        check_not_negated(name, tensor)
    require(src.nbytes == dst.nbytes, f"expected dst to have {src.nbytes} bytes as src, got {dst.nbytes}")
    check_disjoint("src", src, "dst", dst)
    _C.copy(src.data_ptr(), dst.data_ptr(), src.nbytes, torch.get_num_threads())


def reduce(slices: Sequence[Tensor], out: Tensor, *, base: Tensor | None = None) -> None:
    """``out = base + (slices[0] + slices[1] + ...)``, the sum taken as a fixed tree. Not collective.

    n > 1 slices are summed as the first p plus the others, p the largest power of two below n. So groups of 2, 4, 8...
    slices may be summed first, and then their sums, with the same bits. Sums are kept in float32 (float64 for float64)
    and cast once, at the end. On CUDA the addresses of up to 256 slices go along with the launch, and more are summed in groups of
    so many first.

    Args:
        slices: at least one 1-D contiguous tensor, all of one size and one dtype.
        out: of the same size; of the same dtype, float32 for 16-bit slices, or 16-bit for float32 slices. It may be
            ``base`` or, with the same dtype, one of the slices.
        base: of the size and dtype of ``out``, added to the sum; None for nothing.

    Raises:
        ConfigError: a dtype, size, layout or device does not fit, or ``out`` overlaps another tensor in part.
    """
    if not _fit_to_reduce(slices, out, base):
        _check_reduce(slices, out, base)
    slice_code, out_code = DTYPE_CODES[slices[0].dtype], DTYPE_CODES[out.dtype]
    addresses = list(map(Tensor.data_ptr, slices))
    base_address = 0 if base is None else base.data_ptr()
    numel = out.numel()
    if out.is_cpu:
        threads = torch.get_num_threads()
        _C.reduce(addresses, slice_code, base_address, out.data_ptr(), out_code, numel, threads)
        return
    if not has_kernels(out.device):
        by_torch.reduce(slices, out, base)
        return
    if len(slices) > _MOST_SLICES:
        groups = [slices[first : first + _MOST_SLICES] for first in range(0, len(slices), _MOST_SLICES)]
        reduce([_sum_apart(group) for group in groups], out, base=base)
        return
    with torch.cuda.device(out.device):
        _C.cuda_reduce(addresses, slice_code, base_address, out.data_ptr(), out_code, numel, current_stream(out))


_MOST_SLICES = 256  # that one launch takes on CUDA, a power of two


def _sum_apart(slices: Sequence[Tensor]) -> Tensor:
    """The sum of some slices in the dtype in which it is kept."""
    wide = torch.float64 if slices[0].dtype is torch.float64 else torch.float32
    out = torch.empty_like(slices[0], dtype=wide)
    reduce(slices, out)
    return out


def _fit_to_reduce(slices: Sequence[Tensor], out: Tensor, base: Tensor | None) -> bool:
    """Whether `_check_reduce` has nothing to say, without its many calls: this comes once a bucket, while backward runs."""
    dtype, device, begin = out.dtype, out.device, out.data_ptr()
    if not slices or out.is_meta or out.is_neg() or out.dim() != 1 or not out.is_contiguous():
        return False
    of_slices = slices[0].dtype
    if of_slices not in DTYPE_CODES or (
        of_slices is not dtype and not (dtype is torch.float32 and of_slices.itemsize == 2)
    ):
        return False
    end = begin + out.nbytes
    for tensor in slices if base is None else (*slices, base):
        expected = dtype if tensor is base else of_slices
        if tensor.dtype is not expected or tensor.device != device or tensor.shape != out.shape:
            return False
        address = tensor.data_ptr()
        is_out = address == begin and expected is dtype
        if (
            not tensor.is_contiguous()
            or tensor.is_neg()
            or (not is_out and address < end and begin < address + tensor.nbytes)
        ):
            return False
    return True


def _check_reduce(slices: Sequence[Tensor], out: Tensor, base: Tensor | None) -> None:
    require(len(slices) > 0, "expected slices to hold at least one tensor, got none")
    slice_code, out_code = dtype_code("slices[0]", slices[0]), dtype_code("out", out)
    require(
        slice_code == out_code or _is_widening(slices[0].dtype, out.dtype) or _is_widening(out.dtype, slices[0].dtype),
        f"expected out to be {slices[0].dtype}, or one of the two to be float32 and the other 16-bit, got {out.dtype}",
    )
    named = [(f"slices[{i}]", tensor) for i, tensor in enumerate(slices)]
    for name, tensor in named:
        require(tensor.dtype is slices[0].dtype, f"expected {name} to be {slices[0].dtype}, got {tensor.dtype}")
    if base is not None:
        require(base.dtype is out.dtype, f"expected base to be {out.dtype} as out, got {base.dtype}")
        named.append(("base", base))
    for name, tensor in [("out", out), *named]:
        check_flat(name, tensor, out.numel())
        check_device(name, tensor, out)
        if tensor.data_ptr() != out.data_ptr() or tensor.dtype is not out.dtype:
            check_disjoint(name, tensor, "out", out)


def _is_widening(narrow: torch.dtype, wide: torch.dtype) -> bool:
    return wide is torch.float32 and narrow in (torch.bfloat16, torch.float16)


def _same_dense_layout(a: Tensor, b: Tensor) -> bool:
    """Whether walking both storages from the first element on visits the same elements in the same order."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return a.shape == b.shape and lies_as(a, b.stride()) and is_dense(a)


def _resolved(tensor: Tensor) -> Tensor:
    """The tensor, in memory of its own where that has its elements with the other sign."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor
