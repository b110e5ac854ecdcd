"""One step of an optimizer over all segments of a table in one call, every array read and written once.

An optimizer is a `StepKernel`, which is called, and which tells what csrc/ops says of it. `OPTIMIZERS` has all of them.
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
from .storage import SCALE_SUFFIX


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


@dataclass(frozen=True)
class StepKernel:
    """The step of one optimizer; csrc/ops/<name>.h has its formula and the source of that.

    Attributes:
        name: of the optimizer.
        kernels: what its passes are called, one after the other.
        columns: its hyper-parameters, in the order of a row of `groups`.
        states: its arrays of state, by torch's names, in the order of `SegmentArrays.states`.
        signed: for each of them whether it can be negative; what a `SegmentTable` of it is made with.
        flags: for each of them the column that is not 0 for groups that use it; None: every group does.
    """

    name: str
    kernels: tuple[str, ...]
    columns: tuple[str, ...]
    states: tuple[str, ...]
    signed: tuple[bool, ...]
    flags: tuple[int | None, ...]

    def __call__(
        self,
        table: SegmentTable,
        *,
        active: Tensor,
        steps: Tensor,
        groups: Tensor,
        control: StepControl = _NOTHING,
        reduce_squares: Callable[[Tensor], None] | None = None,
        active_on_host: Tensor | None = None,
    ) -> None:
        """Step all active segments. Not collective.

        Args:
            table: the segments.
            active: uint8 [n], of the table's device; nothing of a segment with 0 is touched.
            steps: float32 [2, n], likewise, steps taken so far, below 2**48; raised by one for active segments. They are the sum of
                both rows: the first is their number rounded to float32, the second what that lacks.
            groups: float64 [m, columns], the hyper-parameters of each group, flags as 0 or 1. On the CPU; on the table's device
                where a CUDA graph is captured, and then nobody checks that needed states exist.
            control: what all segments have in common.
            reduce_squares: of an optimizer of two passes, to which every segment is a parameter of its own; called between them
                with float64 [n, 2], the sums of squares of each segment's parameter and of its update. Where a parameter is cut
                into several segments it has to put the sum over them in each one's place.
            active_on_host: `active` on the CPU, where it is known there. Without it, on a device every segment is expected to
                have what an active one needs.

        Raises:
            ConfigError: a dtype, shape or device does not fit, or a state, gradient or group that is needed is missing, or the
                optimizer has one pass and `reduce_squares` is given. Nothing has been changed then.
        """
        has_passes = len(self.kernels) > 1
        require(has_passes or reduce_squares is None, f"expected no reduce_squares for {self.name}, which has one pass")
        _check(self, table, active, steps, groups, control, active if active_on_host is None else active_on_host)
        squares = torch.zeros(len(table.segments), 2, dtype=torch.float64, device=table.device) if has_passes else None
        for number, kernel in enumerate(self.kernels):
            if number and squares is not None and reduce_squares is not None:
                reduce_squares(squares)
            _run(kernel, table, active, steps, groups, control, squares)


OPTIMIZERS: dict[str, StepKernel] = {
    name: StepKernel(
        name,
        tuple(facts["kernels"]),
        tuple(facts["columns"]),
        tuple(facts["states"]),
        tuple(facts["signed"]),
        tuple(facts["flags"]),
    )
    for name, facts in _C.optimizers().items()
}
"""All optimizers of csrc/ops, by name."""

adamw: StepKernel = OPTIMIZERS["adamw"]
sgd: StepKernel = OPTIMIZERS["sgd"]
adagrad: StepKernel = OPTIMIZERS["adagrad"]
lion: StepKernel = OPTIMIZERS["lion"]
lamb: StepKernel = OPTIMIZERS["lamb"]

MOMENTS = tuple(dict.fromkeys(name for kernel in OPTIMIZERS.values() for name in kernel.states))
"""Arrays of state that kernels may keep in 8 bits."""

SCALES = frozenset(name + SCALE_SUFFIX for name in MOMENTS)
"""The names of their scales. (An optimizer of the user's may have a "grad_scale", which is none.)"""


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
            num_bytes = _C.cuda_norm_workspace_bytes(count, table.total_numel)
            workspace = torch.empty(num_bytes, dtype=torch.uint8, device=table.device)
            table.note_launch()
            _C.cuda_squared_norms(*addresses, table.total_numel, workspace.data_ptr(), current_stream(table.rows))
    return squares[:, 0]


def _check(
    kernel: StepKernel,
    table: SegmentTable,
    active: Tensor,
    steps: Tensor,
    groups: Tensor,
    control: StepControl,
    known_active: Tensor,
) -> None:
    """Check the arguments of a step."""
    count = len(table.segments)
    check_table("active", active, torch.uint8, (count,), table.rows)
    check_table("steps", steps, torch.float32, (2, count), table.rows)
    on_host = groups.is_cpu
    like = groups if on_host else table.rows
    check_table("groups", groups, torch.float64, (groups.shape[0] if groups.dim() else 0, len(kernel.columns)), like)
    require(
        groups.shape[0] >= table.num_groups,
        f"expected groups to have a row for every group of segments, at least {table.num_groups}, got {groups.shape[0]}",
    )
    for field in ("grad_scale", "clip_coef", "found_inf"):
        _check_scalar(field, getattr(control, field), table)
    require(0 <= control.seed < 2**64, f"expected seed to be at least 0 and below 2**64, got {control.seed}")
    check_table("active_on_host", known_active, torch.uint8, (count,), known_active)
    _check_grads(table, known_active)
    _check_states(kernel, table, groups if on_host else None, known_active)


def _run(
    kernel: str,
    table: SegmentTable,
    active: Tensor,
    steps: Tensor,
    groups: Tensor,
    control: StepControl,
    squares: Tensor | None,
) -> None:
    """Run one pass."""
    groups = groups.to(table.device)
    arguments = (
        kernel,
        table.rows.data_ptr(),
        active.data_ptr(),
        steps.data_ptr(),
        0 if squares is None else squares.data_ptr(),
        len(table.segments),
        *table.storage.codes,
        groups.data_ptr(),
        _scalar_address(control.grad_scale),
        _scalar_address(control.clip_coef),
        _scalar_address(control.found_inf),
        control.seed,
    )
    if table.device.type == "cpu":
        _C.step(*arguments, torch.get_num_threads())
        return
    with torch.cuda.device(table.device):
        num_bytes = _C.cuda_step_workspace_bytes(kernel, len(table.segments), table.total_numel)
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=table.device)
        table.note_launch()
        _C.cuda_step(*arguments, table.total_numel, workspace.data_ptr(), current_stream(table.rows))


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


def _check_states(kernel: StepKernel, table: SegmentTable, groups: Tensor | None, active: Tensor) -> None:
    known = min(len(kernel.signed), len(table.signed))
    if table.storage.has_scales and tuple(table.signed[:known]) != kernel.signed[:known]:
        raise ConfigError(f"expected a table of 8-bit states with signed={kernel.signed}, got {tuple(table.signed)}")
    may_be_active = _may_be_active(active)
    for state, flag in enumerate(kernel.flags):
        missing = table.lacks_state(state) & may_be_active
        if flag is None:
            require(not missing.any(), f"expected every active segment to have states[{state}], got None")
        elif groups is not None:
            wanting = groups.numpy()[table.groups, flag] != 0
            require(
                not (wanting & missing).any(),
                f"expected states[{state}] of the active segments whose group has column {flag} set, got None",
            )


def _may_be_active(active: Tensor) -> NDArray[np.bool_] | bool:
    """What the host knows: flags on a device are not waited for."""
    return active.numpy() != 0 if active.is_cpu else True
