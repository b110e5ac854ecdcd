"""Whether parameters may be on a device: what torch has to have for it, and what is said where zeroopt has no kernels."""

from __future__ import annotations

import logging

import torch

from .. import ops
from ..errors import KernelUnavailableError, NotSupportedError
from ..ops.devices import check_launch
from ..optim import FusedOptimizer

_log = logging.getLogger("zeroopt")

# Of torch's module for the device: collectives run on a stream of their own.
_NEEDED = ("Stream", "Event", "stream", "current_stream")


def check_device(device: torch.device) -> None:
    """Whether parameters on a device can be trained. Not collective.

    Raises:
        NotSupportedError: not with this torch, whatever kernels there are.
        KernelUnavailableError: there are kernels for it, and they do not run.
    """
    if device.type == "cuda" and ops.has_kernels(device):
        check_launch(device)
    if device.type in ("cpu", "cuda"):
        return
    try:
        module = torch.get_device_module(device)
    except RuntimeError as error:
        raise NotSupportedError(f"parameters are on {device}, of which torch knows no module: {error}") from error
    lacking = [f"torch.{device.type}.{name}" for name in _NEEDED if not hasattr(module, name)]
    if not lacking and not _has_float64(device):
        lacking = ["float64 (for norms and what ranks compare)"]
    if lacking:
        raise NotSupportedError(
            f"parameters are on {device}, for which this torch lacks {', '.join(lacking)}; train on the CPU or on CUDA instead"
        )


def check_stepped_on(optimizer: torch.optim.Optimizer, home: torch.device) -> None:
    """Raise KernelUnavailableError when an optimizer steps by a kernel alone, and there is none for the device where it is to step. Not
    collective."""
    missing = ops.missing_kernels(home)
    if missing is not None and isinstance(optimizer, FusedOptimizer):
        raise KernelUnavailableError(
            f"{type(optimizer).__name__} steps by a fused kernel, and there is none for {home}: {missing}. Or take an optimizer "
            "of torch.optim, which steps by itself"
        )


def check_has_codes(device: torch.device) -> None:
    """Raise KernelUnavailableError when gradients on a device are to travel as codes, and there is no kernel for that. Not collective."""
    missing = ops.missing_kernels(device)
    if missing is not None:
        raise KernelUnavailableError(
            f"gradient_compression encodes gradients by a kernel, and there is none for {device}: {missing}. Or leave it at None; "
            "reduce_dtype=torch.bfloat16 halves what travels without one"
        )


def describe_device(device: torch.device) -> str:
    """What ranks have to have in common of where parameters are: steps by kernels and by optimizers differ in the last bits."""
    return f"{'' if ops.has_kernels(device) else 'no '}kernels for the parameters' device"


def warn_of_missing_kernels(device: torch.device) -> None:
    """Say it in the log where there are no kernels for a device, and what to do about it."""
    missing = ops.missing_kernels(device)
    if missing is not None:
        _log.warning(
            "what runs on %s goes by torch's operations and the optimizer's own step, which takes longer: %s",
            device,
            missing,
        )


def _has_float64(device: torch.device) -> bool:
    try:
        torch.ones(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True
