"""Slow and obvious versions of the kernels, in float64 and in Python's integers. Nothing is shared with the implementation.

A step takes the arrays of one parameter by name (`param`, `grad` and the states), its number counted from 1, and the
hyper-parameters, and returns the arrays after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Arrays = dict[str, Tensor]
QUANT_BLOCK = 256


def pack(src: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Cast with torch, multiplied in float32, or in float64 when either side is."""
    compute = torch.float64 if torch.float64 in (src.dtype, dtype) else torch.float32
    return (src.to(compute) * torch.tensor(scale, dtype=compute)).to(dtype)


def reduce(slices: Sequence[Tensor], dtype: torch.dtype, base: Tensor | None = None) -> Tensor:
    """The tree over the slices, kept in float32 (float64 for float64) and cast once."""
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    total = _tree_sum([piece.to(compute) for piece in slices])
    return (total if base is None else base.to(compute) + total).to(dtype)


def _tree_sum(values: Sequence[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0]
    left = max(2**k for k in range(len(values)) if 2**k < len(values))
    return _tree_sum(values[:left]) + _tree_sum(values[left:])


def adamw(
    arrays: Arrays,
    step: float,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: float,
    amsgrad: float,
    maximize: float,
) -> Arrays:
    """States: exp_avg, exp_avg_sq, and max_exp_avg_sq with amsgrad."""
    p, g, m, v = (arrays[name].double() for name in ("param", "grad", "exp_avg", "exp_avg_sq"))
    g = -g if maximize else g
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    new = {"exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        new["max_exp_avg_sq"] = torch.maximum(arrays["max_exp_avg_sq"].double(), v)
    divisor = new["max_exp_avg_sq"] if amsgrad else v
    m_hat = m / (1 - beta1**step)
    v_hat = divisor / (1 - beta2**step)
    return {**new, "param": p - lr * m_hat / (v_hat.sqrt() + eps)}


def sgd(
    arrays: Arrays,
    step: float,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: float,
    maximize: float,
) -> Arrays:
    """States: momentum_buffer, with momentum."""
    p, g = arrays["param"].double(), arrays["grad"].double()
    g = (-g if maximize else g) + weight_decay * p
    if not momentum:
        return {"param": p - lr * g}
    b = g if step == 1 else momentum * arrays["momentum_buffer"].double() + (1 - dampening) * g
    return {"momentum_buffer": b, "param": p - lr * (g + momentum * b if nesterov else b)}


def adagrad(
    arrays: Arrays, step: float, *, lr: float, lr_decay: float, weight_decay: float, eps: float, maximize: float
) -> Arrays:
    """States: sum."""
    p, g, total = (arrays[name].double() for name in ("param", "grad", "sum"))
    g = (-g if maximize else g) + weight_decay * p
    total = total + g**2
    return {"sum": total, "param": p - lr / (1 + (step - 1) * lr_decay) * g / (total.sqrt() + eps)}


def rmsprop(
    arrays: Arrays,
    step: float,
    *,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: float,
    maximize: float,
) -> Arrays:
    """States: square_avg, momentum_buffer with momentum, and grad_avg if centered."""
    del step
    p, g, v = (arrays[name].double() for name in ("param", "grad", "square_avg"))
    g = (-g if maximize else g) + weight_decay * p
    v = alpha * v + (1 - alpha) * g**2
    new, variance = {"square_avg": v}, v
    if centered:
        new["grad_avg"] = alpha * arrays["grad_avg"].double() + (1 - alpha) * g
        variance = (v - new["grad_avg"] ** 2).clamp(min=0)
    u = g / (variance.sqrt() + eps)
    if momentum:
        u = new["momentum_buffer"] = momentum * arrays["momentum_buffer"].double() + u
    return {**new, "param": p - lr * u}


def lion(
    arrays: Arrays, step: float, *, lr: float, beta1: float, beta2: float, weight_decay: float, maximize: float
) -> Arrays:
    """States: exp_avg."""
    p, g, m = (arrays[name].double() for name in ("param", "grad", "exp_avg"))
    g = -g if maximize else g
    p = p - lr * weight_decay * p
    p = p - lr * (beta1 * m + (1 - beta1) * g).sign()
    return {"exp_avg": beta2 * m + (1 - beta2) * g, "param": p}


def lamb(arrays: Arrays, step: float, **hyper: float) -> Arrays:
    """States: exp_avg, exp_avg_sq."""
    new, squares = lamb_moments(arrays, step, **hyper)
    return {**new, "param": lamb_update({**arrays, **new}, step, squares, **hyper)}


def lamb_moments(arrays: Arrays, step: float, **hyper: float) -> tuple[Arrays, tuple[float, float]]:
    """The states after a step, and the sums of the squares of the parameter and of its update."""
    p, g, m, v = (arrays[name].double() for name in ("param", "grad", "exp_avg", "exp_avg_sq"))
    g = -g if hyper["maximize"] else g
    m = hyper["beta1"] * m + (1 - hyper["beta1"]) * g
    v = hyper["beta2"] * v + (1 - hyper["beta2"]) * g**2
    new = {"exp_avg": m, "exp_avg_sq": v}
    update = _lamb_direction({**arrays, **new}, step, **hyper)
    return new, ((p**2).sum().item(), (update**2).sum().item())


def lamb_update(arrays: Arrays, step: float, squares: tuple[float, float], **hyper: float) -> Tensor:
    """The parameter after a step, from the states after it."""
    param_norm, update_norm = math.sqrt(squares[0]), math.sqrt(squares[1])
    trust = param_norm / update_norm if param_norm > 0 and update_norm > 0 else 1.0
    return arrays["param"].double() - hyper["lr"] * trust * _lamb_direction(arrays, step, **hyper)


def _lamb_direction(arrays: Arrays, step: float, **hyper: float) -> Tensor:
    m_hat = arrays["exp_avg"].double() / (1 - hyper["beta1"] ** step)
    v_hat = arrays["exp_avg_sq"].double() / (1 - hyper["beta2"] ** step)
    direction: Tensor = m_hat / (v_hat.sqrt() + hyper["eps"]) + hyper["weight_decay"] * arrays["param"].double()
    return direction


def squared_norm(values: Tensor) -> float:
    return math.fsum(value * value for value in values.double().tolist())


def round_ties_away(values: Tensor) -> Tensor:
    """float32 to bfloat16, to nearest; what lies half-way goes away from zero."""
    bits = _bits(values)
    rounded = _from_upper_half(bits // 2**16 + (bits % 2**16 >= 2**15).long())
    return torch.where(values.isnan(), torch.nan, rounded)


def round_stochastic(values: Tensor, random: Tensor) -> Tensor:
    """float32 to bfloat16: away from zero when the lower half and 16 random bits together carry, else towards it."""
    bits = _bits(values)
    rounded = _from_upper_half(bits // 2**16 + (bits % 2**16 + random >= 2**16).long())
    return torch.where(values.isnan(), torch.nan, rounded)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as bfloat16 parameters and the lower halves, int16. Not for NaN."""
    lower = _bits(values) % 2**16
    return round_ties_away(values), torch.where(lower >= 2**15, lower - 2**16, lower).to(torch.int16)


def join(rounded: Tensor, remainders: Tensor) -> Tensor:
    """The inverse of `split`: a lower half of 0x8000 or more had rounded the upper half up."""
    lower = remainders.long() % 2**16
    upper = rounded.view(torch.int16).long() % 2**16 - (lower >= 2**15).long()
    bits = upper * 2**16 + lower
    joined: Tensor = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    return joined


def _bits(values: Tensor) -> Tensor:
    assert values.dtype is torch.float32
    return values.view(torch.int32).long() % 2**32


def _from_upper_half(upper: Tensor) -> Tensor:
    return torch.where(upper >= 2**15, upper - 2**16, upper).to(torch.int16).view(torch.bfloat16)


def philox4x32(counter: Sequence[int], key: Sequence[int], rounds: int) -> list[int]:
    """Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def noise(seed: int, step: int, key: int, array: int, first: int, numel: int) -> Tensor:
    """16 random bits for each of the elements [first, first + numel) of a parameter, as csrc/common/philox.h lays them out."""
    drawn: list[int] = []
    for call in range(first // 8, -(-(first + numel) // 8)):
        counter = (call % 2**32, call // 2**32 + array * 2**28, key, step)
        for word in philox4x32(counter, (seed % 2**32, seed // 2**32), rounds=7):
            drawn += [word % 2**16, word // 2**16]
    return torch.tensor(drawn[first % 8 : first % 8 + numel])


def dither(random: Tensor) -> Tensor:
    """What makes rounding to nearest stochastic: -0.5 to 0.5, from 16 random bits."""
    return (random.double() + 0.5) / 2**16 - 0.5


def quantize(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes, int8 or uint8, and the float32 scales of their blocks, of at least one value."""
    finite = torch.where(values.isfinite(), values, 0.0)
    largest = torch.stack([block.max() for block in torch.split(finite.abs(), QUANT_BLOCK)]).double()
    scales = torch.where(largest < 2.0**-125, 0.0, largest if signed else largest.sqrt()).float()
    marked = torch.tensor([not block.isfinite().all() for block in torch.split(values, QUANT_BLOCK)])
    wider = (scales * torch.tensor(64 / 63 if signed else 255 / 253)).clamp(max=torch.finfo(torch.float32).max)
    scales = torch.where(marked, -wider, scales)
    scale, marked = (each.repeat_interleave(QUANT_BLOCK)[: values.numel()] for each in (scales.abs(), marked))
    codes = code_position(finite, scale, signed=signed).round()
    if not signed:
        codes = torch.where(finite > 0, codes.clamp(min=1), codes)
    codes = torch.where(scale > 0, codes, 0.0)
    codes = torch.where(marked, codes.clamp(-126, 126) if signed else codes.clamp(max=253), codes)
    codes = torch.where(values.isinf(), 127 * values.sign() if signed else torch.tensor(254.0), codes)
    codes = torch.where(values.isnan(), -128.0 if signed else 255.0, codes)
    return codes.to(torch.int8 if signed else torch.uint8), scales


def code_position(values: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """The code of a value before it is rounded."""
    if signed:
        share = values.double() / scale.double()
        return 127 * 2 * share / (1 + share.abs())
    return 255 * values.double().sqrt() / scale.double()


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    scale = scales.double().repeat_interleave(QUANT_BLOCK)[: codes.numel()]
    marked, scale = scale.signbit(), scale.abs()
    if codes.dtype is torch.uint8:
        marks = {254: torch.inf, 255: torch.nan}
        values = (scale * codes.double() / 255) ** 2
    else:
        marks = {127: torch.inf, -127: -torch.inf, -128: torch.nan}
        bent = codes.double() / 127
        values = bent / (2 - bent.abs()) * scale
    for code, mark in marks.items():
        values = torch.where(marked & (codes == code), mark, values)
    return values


def wire_encode(
    values: Tensor, residual: Tensor | None, bits: int, num_slices: int, *, seed: int, step: int, key: int
) -> tuple[list[Tensor], Tensor | None]:
    """Slices as codes, uint8 each, and what they leave out, bfloat16."""
    most = 2 ** (bits - 1) - 1
    exact = values.float() if residual is None else values.float() + residual.float()
    left, encoded, blocks_before = [], [], 0
    for part in exact.chunk(num_slices) if exact.numel() else [exact] * num_slices:
        codes, steps = [], []
        for block in torch.split(part, QUANT_BLOCK) if part.numel() else ():
            padded = torch.cat([block, torch.zeros(QUANT_BLOCK - block.numel())])
            random = noise(seed, step, key, 15, blocks_before * QUANT_BLOCK, QUANT_BLOCK)
            blocks_before += 1
            largest = padded.abs().max()
            if not padded.isfinite().all():
                steps.append(torch.tensor(torch.nan))
                codes.append(torch.zeros(QUANT_BLOCK, dtype=torch.int64))
                left.append(torch.full_like(block, torch.nan))
                continue
            usable = bool(largest >= 2.0**-118)
            steps.append(largest / most if usable else torch.tensor(0.0))
            position = padded * (most / largest if usable else 0.0) + dither(random).float()
            codes.append(position.round().clamp(-most, most).long())
            left.append(block - codes[-1][: block.numel()].float() * steps[-1])
        encoded.append(_wire_bytes(codes, steps, bits))
    if residual is None:
        return encoded, None
    kept = torch.cat(left) if left else exact
    return encoded, torch.where(kept.isnan(), residual, kept.bfloat16())


def _wire_bytes(codes: list[Tensor], steps: list[Tensor], bits: int) -> Tensor:
    """Codes of all blocks, their steps, and zeros up to a multiple of 16 bytes."""
    parts = [torch.empty(0, dtype=torch.uint8)]
    for block in codes:
        if bits == 4:
            lower, upper = (block % 16).chunk(2)
            block = lower + 16 * upper
        parts.append((block % 256).to(torch.uint8))
    parts += [torch.stack(steps).view(torch.uint8)] if steps else []
    whole = torch.cat(parts)
    return torch.cat([whole, torch.zeros(-whole.numel() % 16, dtype=torch.uint8)])


def wire_decode(encoded: Tensor, numel: int, bits: int) -> Tensor:
    """The float32 values of a slice of codes."""
    blocks = -(-numel // QUANT_BLOCK)
    num_codes = blocks * QUANT_BLOCK * bits // 8
    stored = encoded[:num_codes].long()
    steps = encoded[num_codes : num_codes + 4 * blocks].clone().view(torch.float32)
    if bits == 4:
        halves = stored.view(blocks, QUANT_BLOCK // 2)
        stored = torch.cat([halves % 16, halves // 16], dim=1).flatten()
    codes = torch.where(stored >= 2 ** (bits - 1), stored - 2**bits, stored)
    return (codes.float() * steps.repeat_interleave(QUANT_BLOCK))[:numel]
