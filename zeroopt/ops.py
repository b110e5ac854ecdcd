"""Typed functions over the compiled kernels: Python checks, C++ computes.

Every function works on this process's own tensors, on the CPU or on one CUDA device; none is collective. On the CPU
kernels run on ``torch.get_num_threads()`` threads, on CUDA they are queued on the device's current stream. They write
through addresses, behind autograd's back: call them where gradients are not recorded. A kernel that the build does not
contain raises `KernelUnavailableError`; `csrc/kernels.h` states what each one moves and computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from . import _C
from .errors import ConfigError, NotSupportedError

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_ADAMW_COLUMNS = 8
_ADAMW_AMSGRAD = 6
_SGD_COLUMNS = 6
_SGD_MOMENTUM = 1


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """Segments that were checked once, for the many steps that use them; make one with `SegmentTable.check`.

    Attributes:
        rows: int64 ``[n, 3]`` of (offset, numel, group), on the device of the arrays; not to be changed any more.
        end: elements the arrays must have, the end of the last segment.
        total_numel: elements of all segments.
        num_groups: rows the table of hyper-parameters must have.
    """

    rows: Tensor
    end: int
    total_numel: int
    num_groups: int

    @classmethod
    def check(cls, rows: Tensor) -> SegmentTable:
        """Check that segments are positive in size and do not overlap. Rows on a CUDA device are copied to the host.

        Raises:
            ConfigError: a row cannot be right.
        """
        _require(rows.dtype is torch.int64, f"expected segments to be int64, got {rows.dtype}")
        _require(
            rows.dim() == 2 and rows.shape[1] == 3 and rows.is_contiguous(),
            f"expected segments to be contiguous of shape [n, 3], got shape {list(rows.shape)}",
        )
        if rows.shape[0] == 0:
            return cls(rows, 0, 0, 0)
        offsets, numels, groups = rows.cpu().numpy().T
        _require(offsets.min() >= 0, "expected segments to have offsets of at least 0")
        _require(numels.min() > 0, "expected segments to have at least one element each")
        _require(groups.min() >= 0, "expected segments to have group indices of at least 0")
        ends = offsets + numels
        order = np.argsort(offsets)
        _require(bool((ends[order[:-1]] <= offsets[order[1:]]).all()), "expected segments not to overlap")
        return cls(rows, int(ends.max()), int(numels.sum()), int(groups.max()) + 1)


def pack(src: Tensor, dst: Tensor, *, scale: float = 1.0) -> None:
    """``dst = src * scale``, cast, element by element in storage order. Not collective.

    Args:
        src: float32, float64, bfloat16 or float16, contiguous or dense with the strides of ``dst``.
        dst: as many elements of any of these dtypes, on the same device; overwritten. It may be ``src`` itself.
        scale: factor; multiplied in float32, or in float64 when either side is.

    Raises:
        ConfigError: a dtype, size, layout or device does not fit, or the two overlap in part.
    """
    src_code, dst_code = _code("src", src), _code("dst", dst)
    _check_device("dst", dst, src)
    _require(src.numel() == dst.numel(), f"expected dst to have {src.numel()} elements as src, got {dst.numel()}")
    _require(
        _same_dense_layout(src, dst),
        f"expected src and dst to be contiguous or dense with the same strides, got strides {src.stride()} of shape "
        f"{list(src.shape)} and {dst.stride()} of shape {list(dst.shape)}; call .contiguous() first",
    )
    if src.data_ptr() != dst.data_ptr() or src_code != dst_code:
        _check_disjoint("src", src, "dst", dst)
    numel = src.numel()
    if src.is_cpu:
        _C.pack(src.data_ptr(), src_code, dst.data_ptr(), dst_code, numel, scale, torch.get_num_threads())
        return
    with torch.cuda.device(src.device):
        _C.cuda_pack(src.data_ptr(), src_code, dst.data_ptr(), dst_code, numel, scale, _stream(src))


def copy(src: Tensor, dst: Tensor) -> None:
    """``dst = src``, for what this processor does not read again soon: large copies go past its cache. CPU; not collective.

    Args:
        src: contiguous.
        dst: as many bytes, contiguous; overwritten.

    Raises:
        ConfigError: a size, layout or device does not fit, or the two overlap.
    """
    _require(src.is_cpu and dst.is_cpu, f"expected src and dst on the CPU, got {src.device} and {dst.device}")
    _require(src.is_contiguous() and dst.is_contiguous(), "expected src and dst to be contiguous")
    _require(src.nbytes == dst.nbytes, f"expected dst to have {src.nbytes} bytes as src, got {dst.nbytes}")
    _check_disjoint("src", src, "dst", dst)
    _C.copy(src.data_ptr(), dst.data_ptr(), src.nbytes, torch.get_num_threads())


def reduce(slices: Sequence[Tensor], out: Tensor, *, base: Tensor | None = None) -> None:
    """``out = base + (slices[0] + slices[1] + ...)``, the sum taken as a fixed tree. Not collective.

    n > 1 slices are summed as the first p plus the others, p the largest power of two below n. So groups of 2, 4, 8...
    slices may be summed first, and then their sums, with the same bits. Sums are kept in float32 (float64 for float64)
    and cast once, at the end. On CUDA the addresses of the slices are copied to the device in every call, which a CUDA
    graph must not capture.

    Args:
        slices: at least one 1-D contiguous tensor, all of one size and one dtype.
        out: of the same size; of the same dtype, float32 for 16-bit slices, or 16-bit for float32 slices. It may be
            ``base`` or, with the same dtype, one of the slices.
        base: of the size and dtype of ``out``, added to the sum; None for nothing.

    Raises:
        ConfigError: a dtype, size, layout or device does not fit, or ``out`` overlaps another tensor in part.
    """
    _require(len(slices) > 0, "expected slices to hold at least one tensor, got none")
    slice_code, out_code = _code("slices[0]", slices[0]), _code("out", out)
    _require(
        slice_code == out_code or _is_widening(slices[0].dtype, out.dtype) or _is_widening(out.dtype, slices[0].dtype),
        f"expected out to be {slices[0].dtype}, or one of the two to be float32 and the other 16-bit, got {out.dtype}",
    )
    named = [(f"slices[{i}]", tensor) for i, tensor in enumerate(slices)]
    for name, tensor in named:
        _require(tensor.dtype is slices[0].dtype, f"expected {name} to be {slices[0].dtype}, got {tensor.dtype}")
    if base is not None:
        _require(base.dtype is out.dtype, f"expected base to be {out.dtype} as out, got {base.dtype}")
        named.append(("base", base))
    for name, tensor in [("out", out), *named]:
        _check_flat(name, tensor, out.numel())
        _check_device(name, tensor, out)
        if tensor.data_ptr() != out.data_ptr() or tensor.dtype is not out.dtype:
            _check_disjoint(name, tensor, "out", out)

    addresses = [tensor.data_ptr() for tensor in slices]
    base_address = 0 if base is None else base.data_ptr()
    numel = out.numel()
    if out.is_cpu:
        threads = torch.get_num_threads()
        _C.reduce(addresses, slice_code, base_address, out.data_ptr(), out_code, numel, threads)
        return
    with torch.cuda.device(out.device):
        # Pinned, so that the copy is queued behind no synchronisation; the allocator keeps it until the copy is done.
        table = torch.tensor(addresses, dtype=torch.int64).pin_memory().to(out.device, non_blocking=True)
        _C.cuda_reduce(
            table.data_ptr(), len(slices), slice_code, base_address, out.data_ptr(), out_code, numel, _stream(out)
        )


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    segments: Tensor | SegmentTable,
    active: Tensor,
    steps: Tensor,
    groups: Tensor,
    max_exp_avg_sq: Tensor | None = None,
) -> None:
    """One step of AdamW or Adam, as `torch.optim` does it, over the segments of flat arrays. Not collective.

    Args:
        param, exp_avg, exp_avg_sq: float32, 1-D, contiguous, of one size and device; updated in place.
        grad: likewise, only read.
        segments: int64 ``[n, 3]`` rows of (offset, numel, group) into these arrays. A tensor is checked in every call,
            which on CUDA waits for the device; pass a `SegmentTable` where that matters.
        active: uint8 ``[n]``; nothing of a segment with 0 is touched.
        steps: float32 ``[n]``, steps taken so far; raised by one for active segments.
        groups: float64 ``[m, 8]`` rows of (lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize), flags
            as 0 or 1. decoupled is AdamW's weight decay, otherwise it is Adam's.
        max_exp_avg_sq: as exp_avg_sq, when the group of an active segment has amsgrad.

    All tensors are on one device.

    Raises:
        ConfigError: a dtype, shape, layout or device does not fit, arrays or segments overlap, or there is no
            max_exp_avg_sq and one is needed.
    """
    arrays = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if max_exp_avg_sq is not None:
        arrays["max_exp_avg_sq"] = max_exp_avg_sq
    table = _check_step(arrays, segments, active, steps, groups, _ADAMW_COLUMNS)
    if max_exp_avg_sq is None:
        _check_unused("max_exp_avg_sq", table, active, groups, _ADAMW_AMSGRAD, "amsgrad")

    addresses = (
        param.data_ptr(),
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        0 if max_exp_avg_sq is None else max_exp_avg_sq.data_ptr(),
        table.rows.data_ptr(),
        active.data_ptr(),
        steps.data_ptr(),
        table.rows.shape[0],
        groups.data_ptr(),
    )
    if param.is_cpu:
        _C.adamw(*addresses, torch.get_num_threads())
        return
    with torch.cuda.device(param.device):
        workspace = _workspace(_C.cuda_adamw_workspace_bytes(table.rows.shape[0]), param)
        _C.cuda_adamw(*addresses, table.total_numel, workspace.data_ptr(), _stream(param))


def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    segments: Tensor | SegmentTable,
    active: Tensor,
    steps: Tensor,
    groups: Tensor,
) -> None:
    """One step of SGD, as `torch.optim.SGD` does it, over the segments of flat arrays. Not collective.

    Args:
        param: float32, 1-D, contiguous; updated in place.
        grad: likewise, only read.
        momentum_buffer: likewise, updated in place; the first step of a segment overwrites it. None when no group of an
            active segment has momentum.
        segments, active, steps: as for `adamw`.
        groups: float64 ``[m, 6]`` rows of (lr, momentum, dampening, weight_decay, nesterov, maximize), flags as 0 or 1.

    All tensors are on one device.

    Raises:
        ConfigError: a dtype, shape, layout or device does not fit, arrays or segments overlap, or there is no
            momentum_buffer and one is needed.
    """
    arrays = {"param": param, "grad": grad}
    if momentum_buffer is not None:
        arrays["momentum_buffer"] = momentum_buffer
    table = _check_step(arrays, segments, active, steps, groups, _SGD_COLUMNS)
    if momentum_buffer is None:
        _check_unused("momentum_buffer", table, active, groups, _SGD_MOMENTUM, "momentum")

    addresses = (
        param.data_ptr(),
        grad.data_ptr(),
        0 if momentum_buffer is None else momentum_buffer.data_ptr(),
        table.rows.data_ptr(),
        active.data_ptr(),
        steps.data_ptr(),
        table.rows.shape[0],
        groups.data_ptr(),
    )
    if param.is_cpu:
        _C.sgd(*addresses, torch.get_num_threads())
        return
    with torch.cuda.device(param.device):
        workspace = _workspace(_C.cuda_sgd_workspace_bytes(table.rows.shape[0]), param)
        _C.cuda_sgd(*addresses, table.total_numel, workspace.data_ptr(), _stream(param))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _code(name: str, tensor: Tensor) -> int:
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise ConfigError(f"expected {name} to be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if not (tensor.is_cpu or tensor.is_cuda):
        raise NotSupportedError(f"there are kernels for CPU and CUDA tensors, {name} is on {tensor.device}")
    return code


def _is_widening(narrow: torch.dtype, wide: torch.dtype) -> bool:
    return wide is torch.float32 and narrow in (torch.bfloat16, torch.float16)


def _check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ConfigError(f"expected {name} to be on {other.device}, got {tensor.device}")


def _check_flat(name: str, tensor: Tensor, numel: int) -> None:
    if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() != numel:
        raise ConfigError(
            f"expected {name} to be 1-D and contiguous with {numel} elements, got shape {list(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )


def _check_disjoint(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    other_start, other_end = other.data_ptr(), other.data_ptr() + other.numel() * other.element_size()
    if start < other_end and other_start < end:
        raise ConfigError(f"expected {name} and {other_name} not to overlap in memory; clone one of them")


def _same_dense_layout(a: Tensor, b: Tensor) -> bool:
    """Whether walking both storages from the first element on visits the same elements in the same order."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    if a.shape != b.shape or a.stride() != b.stride():
        return False
    expected = 1
    for stride, size in sorted(zip(a.stride(), a.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _check_step(
    arrays: dict[str, Tensor],
    segments: Tensor | SegmentTable,
    active: Tensor,
    steps: Tensor,
    groups: Tensor,
    columns: int,
) -> SegmentTable:
    table = segments if isinstance(segments, SegmentTable) else SegmentTable.check(segments)
    param = arrays["param"]
    numel = param.numel()
    for name, array in arrays.items():
        if array.dtype is not torch.float32:
            raise ConfigError(f"expected {name} to be float32, got {array.dtype}")
        _check_flat(name, array, numel)
        _check_device(name, array, param)
    _code("param", param)
    if numel > 0:
        by_address = sorted((array.data_ptr(), name) for name, array in arrays.items())
        for (address, name), (next_address, next_name) in pairwise(by_address):
            if address + 4 * numel > next_address:
                raise ConfigError(f"expected {name} and {next_name} not to overlap in memory")

    count = table.rows.shape[0]
    _check_table("segments", table.rows, torch.int64, (count, 3), param)
    _check_table("active", active, torch.uint8, (count,), param)
    _check_table("steps", steps, torch.float32, (count,), param)
    _check_table("groups", groups, torch.float64, (groups.shape[0] if groups.dim() else 0, columns), param)
    if table.end > numel:
        raise ConfigError(f"expected segments to end within the {numel} elements of param, got an end of {table.end}")
    if table.num_groups > groups.shape[0]:
        raise ConfigError(
            f"expected groups to have a row for every group of segments, at least {table.num_groups}, "
            f"got {groups.shape[0]}"
        )
    return table


def _check_table(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], param: Tensor) -> None:
    if tensor.dtype is not dtype:
        raise ConfigError(f"expected {name} to be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ConfigError(f"expected {name} to be contiguous of shape {list(shape)}, got {list(tensor.shape)}")
    _check_device(name, tensor, param)


def _check_unused(array: str, table: SegmentTable, active: Tensor, groups: Tensor, column: int, option: str) -> None:
    # Reading tables on a CUDA device would wait for it; there the kernel goes on as if the option were off.
    if not groups.is_cpu:
        return
    stepped = table.rows.numpy()[active.numpy() != 0, 2]
    if groups.numpy()[stepped, column].any():
        raise ConfigError(f"expected {array} to be a tensor, for the group of an active segment has {option}, got None")


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _workspace(num_bytes: int, param: Tensor) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=param.device)
