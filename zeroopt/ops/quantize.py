"""Arrays as 8-bit codes with a scale for every 256 elements; csrc/common/int8_code.h has the code and its source."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from .checks import check_device, check_flat, check_none_overlap, current_stream, require
from .devices import require_kernels
from .storage import QUANT_BLOCK, num_blocks


def quantize(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Encode an array. Not collective.

    A code is within half a step of the value: for signed codes about 1/127 of the block's largest magnitude there and 1/254
    near zero, for unsigned ones 1/255 of the square root. What is not finite comes back as itself; the scale of its block has
    a sign then, and the steps of the others in the block are wider by a hundredth.

    Args:
        values: float32, 1-D, contiguous. For unsigned codes, not negative.
        codes: int8 (signed) or uint8 (for values that cannot be negative), as many elements; overwritten.
        scales: float32, one element for every 256 begun ones; overwritten.

    Raises:
        ConfigError: a dtype, size, layout or device does not fit.
        KernelUnavailableError: there are no kernels for the device.
    """
    is_signed = _check(values, codes, scales)
    addresses = (values.data_ptr(), codes.data_ptr(), scales.data_ptr(), values.numel(), is_signed)
    if values.is_cpu:
        _C.quantize(*addresses, torch.get_num_threads())
        return
    with torch.cuda.device(values.device):
        _C.cuda_quantize(*addresses, current_stream(values))


def dequantize(codes: Tensor, scales: Tensor, values: Tensor) -> None:
    """Decode an array into `values`; the arguments are those of `quantize`. Not collective.

    Raises:
        ConfigError: a dtype, size, layout or device does not fit.
        KernelUnavailableError: there are no kernels for the device.
    """
    is_signed = _check(values, codes, scales)
    addresses = (codes.data_ptr(), scales.data_ptr(), values.data_ptr(), values.numel(), is_signed)
    if values.is_cpu:
        _C.dequantize(*addresses, torch.get_num_threads())
        return
    with torch.cuda.device(values.device):
        _C.cuda_dequantize(*addresses, current_stream(values))


def encode_again(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The very codes that `dequantize` has decoded to `values`. Not collective.

    `quantize` finds the same ones only where a block's largest code is the largest of all, which rounding in an optimizer's step
    may miss.

    Args:
        values: float32, 1-D.
        scales: float32, one element for every 256 begun ones.
        dtype: of the codes: int8 (signed) or uint8.
    """
    scale = scales.repeat_interleave(QUANT_BLOCK)[: values.numel()].to(values.device)
    marked, scale = scale.signbit(), scale.abs()
    # Where the scale is 0, or was not finite before signs marked blocks, all codes are 0.
    inverse = torch.where(scale.isfinite() & (scale > 0), scale.double().reciprocal(), 0.0)
    if dtype is torch.int8:
        share = values.double() * inverse
        codes = 254 * share / (1 + share.abs())
        marks = torch.where(values.isnan(), -128.0, values.sign().double() * 127)
    else:
        codes = 255 * values.double().sqrt() * inverse
        marks = torch.where(values.isnan(), 255.0, 254.0)
    codes = torch.where(marked & ~values.isfinite(), marks, codes.round().nan_to_num(0.0))
    return codes.to(dtype)


def requantize(values: Tensor, stored_scales: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Encode an array that may be what `dequantize` gave for `stored_scales`. Not collective.

    Each block for which that is so gets the very codes and the scale that it had. All others, such as those that an optimizer
    without codes has stepped since, are encoded as `quantize` does.

    Args:
        values, codes, scales: those of `quantize`.
        stored_scales: as many as `scales`, of any floating-point dtype, on any device. It may be `scales` itself.

    Raises:
        ConfigError: a dtype, size, layout or device does not fit. Nothing has been written then.
    """
    _check(values, codes, scales)
    require(
        stored_scales.is_floating_point() and stored_scales.shape == scales.shape,
        f"expected stored_scales to be {scales.numel()} floating-point numbers, got {stored_scales.dtype} of shape "
        f"{list(stored_scales.shape)}",
    )
    stored_scales = stored_scales.resolve_neg().to(values.device, torch.float32, copy=True).contiguous()
    again, decoded = encode_again(values, stored_scales, codes.dtype), torch.empty_like(values)
    dequantize(again, stored_scales, decoded)
    quantize(values, codes, scales)
    differs = torch.zeros(scales.numel() * QUANT_BLOCK, dtype=torch.bool, device=values.device)
    differs[: values.numel()] = (decoded != values) & ~(decoded.isnan() & values.isnan())
    changed = differs.view(-1, QUANT_BLOCK).any(dim=1)
    scales.copy_(torch.where(changed, scales, stored_scales))
    codes.copy_(torch.where(changed.repeat_interleave(QUANT_BLOCK)[: codes.numel()], codes, again))


def _check(values: Tensor, codes: Tensor, scales: Tensor) -> bool:
    """Whether codes are signed."""
    require(values.dtype is torch.float32, f"expected values to be float32, got {values.dtype}")
    require(codes.dtype in (torch.int8, torch.uint8), f"expected codes to be int8 or uint8, got {codes.dtype}")
    require(scales.dtype is torch.float32, f"expected scales to be float32, got {scales.dtype}")
    for name, tensor, numel in (
        ("values", values, values.numel()),
        ("codes", codes, values.numel()),
        ("scales", scales, num_blocks(values.numel())),
    ):
        check_flat(name, tensor, numel)
        check_device(name, tensor, values)
    check_none_overlap((("values", values), ("codes", codes), ("scales", scales)))
    require_kernels(values.device)
    return codes.dtype is torch.int8
