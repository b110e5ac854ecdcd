"""Slow and obvious versions of the kernels, in float64, one element formula at a time.

They take the tables of `zeroopt.ops` and return new tensors; nothing is shared with the implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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


def _each_segment(
    segments: Tensor,
    active: Tensor,
    steps: Tensor,
    groups: Tensor,
    step_segment: Callable[[slice, float, list[float]], None],
) -> Tensor:
    """Call step_segment(range, number of the step, hyper-parameters) for the active segments; return the steps after."""
    steps = steps.clone()
    for i, (offset, numel, group) in enumerate(segments.tolist()):
        if active[i]:
            steps[i] += 1
            step_segment(slice(offset, offset + numel), steps[i].item(), groups[group].tolist())
    return steps


def adamw(
    arrays: dict[str, Tensor], segments: Tensor, active: Tensor, steps: Tensor, groups: Tensor
) -> dict[str, Tensor]:
    """One step over float64 copies of param, grad, exp_avg, exp_avg_sq and, for AMSGrad, max_exp_avg_sq."""
    new = {name: array.double().clone() for name, array in arrays.items()}

    def step_segment(at: slice, step: float, row: list[float]) -> None:
        lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize = row
        p, g, m, v = (new[name][at] for name in ("param", "grad", "exp_avg", "exp_avg_sq"))
        g = -g if maximize else g
        if decoupled:
            p = p - lr * weight_decay * p
        else:
            g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        divisor = v
        if amsgrad:
            divisor = new["max_exp_avg_sq"][at] = torch.maximum(new["max_exp_avg_sq"][at], v)
        m_hat = m / (1 - beta1**step)
        new["param"][at] = p - lr * m_hat / (divisor.sqrt() / math.sqrt(1 - beta2**step) + eps)
        new["exp_avg"][at], new["exp_avg_sq"][at] = m, v

    new["steps"] = _each_segment(segments, active, steps, groups, step_segment)
    return new


def sgd(
    arrays: dict[str, Tensor], segments: Tensor, active: Tensor, steps: Tensor, groups: Tensor
) -> dict[str, Tensor]:
    """One step over float64 copies of param, grad and, with momentum, momentum_buffer."""
    new = {name: array.double().clone() for name, array in arrays.items()}

    def step_segment(at: slice, step: float, row: list[float]) -> None:
        lr, momentum, dampening, weight_decay, nesterov, maximize = row
        p, g = new["param"][at], new["grad"][at]
        g = (-g if maximize else g) + weight_decay * p
        if momentum:
            b = g if step == 1 else momentum * new["momentum_buffer"][at] + (1 - dampening) * g
            new["momentum_buffer"][at] = b
            g = g + momentum * b if nesterov else b
        new["param"][at] = p - lr * g

    new["steps"] = _each_segment(segments, active, steps, groups, step_segment)
    return new
