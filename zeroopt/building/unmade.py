"""What of a model is on the meta device, and how it becomes tensors that have a device, but no memory yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ConfigError, NotSupportedError
from ..plan.dtensors import is_distributed


@dataclass(frozen=True, eq=False)
class Unmade:
    """A tensor of a model on the meta device.

    Attributes:
        name: its first one in the model.
        kind: "parameter" or "buffer".
        module: the one that holds it under that name.
    """

    name: str
    kind: str
    tensor: Tensor
    module: nn.Module

    def __str__(self) -> str:
        path, _, _ = self.name.rpartition(".")
        holder = f"module {path!r}, a {type(self.module).__name__}," if path else f"the {type(self.module).__name__}"
        return f"{self.kind} {self.name!r} of {holder}"


def find_unmade(model: nn.Module) -> dict[Tensor, Unmade]:
    """The parameters and buffers on the meta device, each once.

    Raises:
        ConfigError: one has what it would lose by becoming another tensor: hooks or a gradient.
        NotSupportedError: one is a DTensor.
    """
    found: dict[Tensor, Unmade] = {}
    for path, module in model.named_modules():
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta and tensor not in found:
                    found[tensor] = Unmade(f"{path}.{name}" if path else name, kind, tensor, module)
    for unmade in found.values():
        _check(unmade)
    return found


def _check(unmade: Unmade) -> None:
    tensor = unmade.tensor
    if is_distributed(tensor):
        raise NotSupportedError(
            f"{unmade} is a DTensor on the meta device; give the model memory (to_empty) and values before wrapping: only plain "
            "tensors are built by zeroopt.wrap"
        )
    if is_lazy(tensor):
        raise ConfigError(f"{unmade} is not initialised yet; run the model once before wrapping")
    if type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
        raise NotSupportedError(
            f"{unmade} is a {type(tensor.data).__name__} ({tensor.layout}) on the meta device; only plain tensors are built by "
            "zeroopt.wrap"
        )
    if tensor.grad is not None:
        raise ConfigError(
            f"{unmade} is on the meta device and has a gradient; clear it (model.zero_grad()) before wrapping"
        )
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise ConfigError(
            f"{unmade} is on the meta device and has hooks, which it would lose; register them after wrapping"
        )


def device_for(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Where what is on the meta device is to be made: the given device, that of the model's other parameters, or torch's default.

    Raises:
        ConfigError: that would be the meta device.
    """
    if device is not None:
        chosen = torch.device(device)
    else:
        placed = (param.device for param in model.parameters() if not param.is_meta)
        # Of 2.6 and older, torch.get_default_device() does not see `with torch.device(...)`.
        chosen = next(placed, None) or torch.empty(0).device
    if chosen.type == "meta":
        raise ConfigError(
            "expected a device to make the model on, got the meta device: pass zeroopt.wrap(..., device=...), outside of "
            "`with torch.device('meta')`"
        )
    return torch.empty(0, device=chosen).device  # with the index of the GPU


class Hollowing:
    """Tensors on the meta device become tensors without memory on another one, and stay the same objects.

    Their shapes, strides and dtypes are as before. Whoever reads elements of such a tensor reads no memory.
    """

    def __init__(self, tensors: Sequence[Unmade], device: torch.device) -> None:
        self._before = [(unmade.tensor, _exchange(unmade.tensor, device)) for unmade in tensors]

    def undo(self) -> None:
        """All are on the meta device again."""
        for tensor, before in self._before:
            torch._C._swap_tensor_impl(tensor, before)
        self._before.clear()


def _exchange(tensor: Tensor, device: torch.device) -> Tensor:
    """Make the tensor one without memory, and return what it was.

    `torch.utils.swap_tensors` does as much, but refuses tensors to which there are weak references, as LSTMs have them.
    """
    hollow = torch.empty(0, dtype=tensor.dtype, device=device)
    storage = hollow.untyped_storage()
    hollow.set_(storage, 0, tensor.shape, tensor.stride())
    storage.resize_(0)
    other = nn.Parameter(hollow, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
    torch._C._swap_tensor_impl(tensor, other)
    return other


def meta_attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors on the meta device that a module holds as plain attributes."""
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and value.is_meta:
            yield name, value
