"""One step of an optimizer over all segments of a table in one call, every array read and written once.

All functions take the same arguments:

    table: the segments; see `SegmentTable`. Its states are those that the function names, in that order.
    active: uint8 [n], of the table's device; nothing of a segment with 0 is touched.
    steps: float32 [n], likewise, steps taken so far; raised by one for active segments.
    groups: float64 [m, columns], the hyper-parameters of each group in the order that the function names, flags as 0 or 1. On
        the CPU; on the table's device where a CUDA graph is captured, and then nobody checks that needed states exist.
    control: what all segments have in common; see `StepControl`.

and raise `ConfigError` when a dtype, shape or device does not fit, or a state, gradient or group that is needed is missing;
nothing has been changed then. None is collective. csrc/ops has the formulas with their sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _C
from ..errors import ConfigError
from .checks import check_device, check_table, current_stream, require
from .segments import SegmentTable


@dataclass(frozen=True, eq=False)
class StepControl:
    """What all segments of a step have in common. Tensors are read when the kernel runs, so nobody waits to know them.

    Attributes:
        grad_scale: float32, one element, of the table's device; gradients are divided by it.
        clip_coef: likewise; and multiplied by it.
        found_inf: likewise; when it is not 0, the step is skipped and nothing is written, `steps` neither.
        seed: of stochastic rounding, 0 <= seed < 2**64. The same on all ranks, or results depend on the number of ranks.
    """

    grad_scale: Tensor | None = None
    clip_coef: Tensor | None = None
    found_inf: Tensor | None = None
    seed: int = 0


_NOTHING = StepControl()


def adamw(
    table: SegmentTable, *, active: Tensor, steps: Tensor, groups: Tensor, control: StepControl = _NOTHING
) -> None:
    """AdamW and Adam, as `torch.optim` has them.

    states: exp_avg, exp_avg_sq, max_exp_avg_sq (for groups with amsgrad).
    groups: lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize. decoupled is AdamW's weight decay, otherwise it
    is Adam's.
    """
    _step("adamw", table, active, steps, groups, control, columns=8, signed=(True, False, False), flagged=6)


def sgd(table: SegmentTable, *, active: Tensor, steps: Tensor, groups: Tensor, control: StepControl = _NOTHING) -> None:
    """SGD, as `torch.optim.SGD`.

    states: momentum_buffer (for groups with momentum); the first step of a segment overwrites it.
    groups: lr, momentum, dampening, weight_decay, nesterov, maximize.
    """
    _step("sgd", table, active, steps, groups, control, columns=6, signed=(True,), flagged=1)


def adagrad(
    table: SegmentTable, *, active: Tensor, steps: Tensor, groups: Tensor, control: StepControl = _NOTHING
) -> None:
    """Adagrad, as `torch.optim.Adagrad`.

    states: sum, which cannot be negative.
    groups: lr, lr_decay, weight_decay, eps, maximize.
    """
    _step("adagrad", table, active, steps, groups, control, columns=5, signed=(False,))


def lion(
    table: SegmentTable, *, active: Tensor, steps: Tensor, groups: Tensor, control: StepControl = _NOTHING
) -> None:
    """Lion (Chen et al. 2023, arXiv:2302.06675).

    states: exp_avg.
    groups: lr, beta1, beta2, weight_decay, maximize.
    """
    _step("lion", table, active, steps, groups, control, columns=5, signed=(True,))


def lamb(
    table: SegmentTable,
    *,
    active: Tensor,
    steps: Tensor,
    groups: Tensor,
    control: StepControl = _NOTHING,
    reduce_squares: Callable[[Tensor], None] | None = None,
) -> None:
    """LAMB (You et al. 2020, arXiv:1904.00962), in two passes. Every segment is a parameter of its own.

    states: exp_avg, exp_avg_sq.
    groups: lr, beta1, beta2, eps, weight_decay, maximize.

    Args:
        reduce_squares: called between the passes with float64 [n, 2], the sums of squares of each segment's parameter and of
            its update; where a parameter is cut into several segments it has to put the sum over them in each one's place.
    """
    squares = torch.zeros(len(table.segments), 2, dtype=torch.float64, device=table.device)
    tables = (table, active, steps, groups, control)
    _step("lamb_moments", *tables, columns=6, signed=(True, False), squares=squares)
    if reduce_squares is not None:
        reduce_squares(squares)
    _step("lamb_update", *tables, columns=6, signed=(True, False), squares=squares)


def squared_norms(table: SegmentTable, *, active: Tensor, found_inf: Tensor) -> Tensor:
    """The sum of the squares of each segment's gradient, and whether all of them are finite. Not collective.

    Sums are taken in float64 and in an order that depends on the segment alone: the number of threads does not matter.

    Args:
        table: the segments; only their gradients are read.
        active: uint8 [n]; the sum of a segment with 0 is 0.
        found_inf: float32, one element, set to 1 where an element is infinite or NaN, else left as it is.

    Returns:
        float64 [n], on the table's device.

    Raises:
        ConfigError: a dtype, shape or device does not fit, or an active segment has no gradient.
    """
    count = len(table.segments)
    check_table("active", active, torch.uint8, (count,), table.rows)
    check_table("found_inf", found_inf, torch.float32, tuple(found_inf.shape), table.rows)
    require(found_inf.numel() == 1, f"expected found_inf to have one element, got {found_inf.numel()}")
    _check_grads(table, active)
    squares = torch.zeros(count, 2, dtype=torch.float64, device=table.device)
    grad_code = table.storage.codes[1]
    addresses = (table.rows.data_ptr(), active.data_ptr(), squares.data_ptr(), count, grad_code, found_inf.data_ptr())
    if table.device.type == "cpu":
        _C.squared_norms(*addresses, torch.get_num_threads())
    else:
        with torch.cuda.device(table.device):
            workspace = _workspace(table)
            _C.cuda_squared_norms(*addresses, table.total_numel, workspace.data_ptr(), current_stream(table.rows))
    return squares[:, 0]


def _step(
    name: str,
    table: SegmentTable,
    active: Tensor,
    steps: Tensor,
    groups: Tensor,
    control: StepControl,
    *,
    columns: int,
    signed: tuple[bool, ...],
    flagged: int | None = None,
    squares: Tensor | None = None,
) -> None:
    """Check and run one kernel.

    Args:
        signed: for each state that the kernel knows whether it can be negative.
        flagged: the column of `groups` that is not 0 for groups that need the last of them; None: all groups do.
    """
    count = len(table.segments)
    check_table("active", active, torch.uint8, (count,), table.rows)
    check_table("steps", steps, torch.float32, (count,), table.rows)
    on_host = groups.is_cpu
    like = groups if on_host else table.rows
    check_table("groups", groups, torch.float64, (groups.shape[0] if groups.dim() else 0, columns), like)
    require(
        groups.shape[0] >= table.num_groups,
        f"expected groups to have a row for every group of segments, at least {table.num_groups}, got {groups.shape[0]}",
    )
    for field in ("grad_scale", "clip_coef", "found_inf"):
        _check_scalar(field, getattr(control, field), table)
    require(0 <= control.seed < 2**64, f"expected seed to be at least 0 and below 2**64, got {control.seed}")
    _check_grads(table, active)
    _check_states(table, groups if on_host else None, active, signed, flagged)

    groups = groups.to(table.device)
    arguments = (
        table.rows.data_ptr(),
        active.data_ptr(),
        steps.data_ptr(),
        0 if squares is None else squares.data_ptr(),
        count,
        *table.storage.codes,
        groups.data_ptr(),
        _scalar_address(control.grad_scale),
        _scalar_address(control.clip_coef),
        _scalar_address(control.found_inf),
        control.seed,
    )
    if table.device.type == "cpu":
        getattr(_C, name)(*arguments, torch.get_num_threads())
        return
    with torch.cuda.device(table.device):
        workspace = _workspace(table)
        stream = current_stream(table.rows)
        getattr(_C, f"cuda_{name}")(*arguments, table.total_numel, workspace.data_ptr(), stream)


def _check_scalar(name: str, scalar: Tensor | None, table: SegmentTable) -> None:
    if scalar is None:
        return
    check_device(name, scalar, table.rows)
    require(
        scalar.dtype is torch.float32 and scalar.numel() == 1,
        f"expected {name} to be one element of float32, got {scalar.numel()} of {scalar.dtype}",
    )


def _scalar_address(scalar: Tensor | None) -> int:
    return 0 if scalar is None else scalar.data_ptr()


def _check_grads(table: SegmentTable, active: Tensor) -> None:
    missing = table.lacks_grad & _may_be_active(active)
    require(not missing.any(), "expected every active segment to have a gradient")


def _check_states(
    table: SegmentTable, groups: Tensor | None, active: Tensor, signed: tuple[bool, ...], flagged: int | None
) -> None:
    known = min(len(signed), len(table.signed))
    if table.storage.has_scales and tuple(table.signed[:known]) != signed[:known]:
        raise ConfigError(f"expected a table of 8-bit states with signed={signed}, got {tuple(table.signed)}")
    may_be_active = _may_be_active(active)
    always = len(signed) if flagged is None else len(signed) - 1
    for state in range(always):
        missing = table.lacks_state(state) & may_be_active
        require(not missing.any(), f"expected every active segment to have states[{state}], got None")
    if flagged is None or groups is None:
        return
    wanting = groups.numpy()[table.groups, flagged] != 0
    require(
        not (wanting & table.lacks_state(always) & may_be_active).any(),
        f"expected states[{always}] of the active segments whose group has column {flagged} set, got None",
    )


def _may_be_active(active: Tensor) -> NDArray[np.bool_] | bool:
    """What the host knows: flags on a device are not waited for."""
    return active.numpy() != 0 if active.is_cpu else True


def _workspace(table: SegmentTable) -> Tensor:
    num_bytes = _C.cuda_workspace_bytes(len(table.segments), table.total_numel)
    return torch.empty(num_bytes, dtype=torch.uint8, device=table.device)
