"""What one forward and backward hold besides parameters: a pass with tensors that have shapes and no memory."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from ..building.unchanged import unchanged
from ..errors import ConfigError
from .live_bytes import LiveBytes

Sample = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: one argument, positional ones, or named ones."""

LossOf = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Activations:
    """What a pass holds over time, parameters, the model's buffers and its inputs aside. The gradient of a parameter is among it
    until it is complete: then a hook takes it away.

    Attributes:
        order: names of the parameters as their gradients are complete.
        gradients: bytes of each, in that order.
        peaks: the most from the completion of one gradient to that of the next: the first is that of the forward and of
            backward up to the first gradient, the last that of what comes after the last one.
    """

    order: tuple[str, ...]
    gradients: tuple[int, ...]
    peaks: tuple[int, ...]

    @property
    def peak(self) -> int:
        """The most of all."""
        return max(self.peaks)


def trace_activations(
    model: nn.Module,
    sample: Sample,
    loss: LossOf | None = None,
    *,
    param_dtype: torch.dtype | None = None,
    cast_inputs: bool = False,
    device: str = "cpu",
) -> Activations:
    """Go through one forward and backward, activation checkpointing included. The model stays as it is, be it on the meta device or
    on another one. Not collective.

    Nothing is computed, unless an operator cannot do without values: then a model and a sample on the CPU run once.

    Args:
        sample: tensors of any device, whose values do not matter.
        loss: makes the loss of what the model returns. None: that itself where it is a number, its `loss` where it has one (or
            an entry of that name), and else the sum of its first floating-point tensor.
        param_dtype: what float32 parameters are cast to.
        cast_inputs: floating-point inputs, too.
        device: "cpu" or "cuda", for which kernels are chosen; where torch finds no GPU, those of the CPU are. Nothing runs there.

    Raises:
        ConfigError: the model can be traced neither without values nor with them, or returns no loss.
    """
    try:
        with _quiet(), unchanged(model):
            return _trace(model, sample, loss, _Fakes(param_dtype, param_dtype if cast_inputs else None, device))
    except ConfigError:
        raise
    # Whatever it is: operators without a rule for fake tensors raise what they like.
    except Exception as error:
        if not _has_values(model, sample):
            raise ConfigError(
                f"the model cannot be traced without values ({type(error).__name__}: {error}): build it and the sample on the CPU, "
                "where one pass is then run; or leave the sample out, and have everything else estimated"
            ) from error
        with torch.random.fork_rng(), unchanged(model):
            return _trace(model, sample, loss, _Copies(param_dtype, param_dtype if cast_inputs else None))


class _Fakes:
    """Tensors without memory in the place of a model's parameters and buffers, and of its inputs.

    Attributes:
        granule: bytes of which the device's allocator gives multiples.
    """

    def __init__(self, param_dtype: torch.dtype | None, input_dtype: torch.dtype | None, device: str) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._param_dtype, self._input_dtype = param_dtype, input_dtype
        # A torch that finds no GPU ends the process when it is asked for kernels of one.
        self._device = device if device == "cpu" or torch.cuda.is_available() else "cpu"
        self.granule = 512 if device.startswith("cuda") else 64

    def running(self) -> AbstractContextManager[Any]:
        return self._mode

    def param(self, param: Tensor) -> nn.Parameter:
        return nn.Parameter(self._like(param, self._cast(param, self._param_dtype)), param.requires_grad)

    def buffer(self, buffer: Tensor) -> Tensor:
        return self._like(buffer, buffer.dtype)

    def input(self, value: Any) -> Any:
        return self._like(value, self._cast(value, self._input_dtype)) if isinstance(value, Tensor) else value

    def _like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        with self._mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=self._device)

    @staticmethod
    def _cast(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
        return dtype if dtype is not None and tensor.dtype is torch.float32 else tensor.dtype


class _Copies(_Fakes):
    """Real ones: parameters over the same memory where they keep their dtype, copies of the rest."""

    def __init__(self, param_dtype: torch.dtype | None, input_dtype: torch.dtype | None) -> None:
        super().__init__(param_dtype, input_dtype, "cpu")

    def running(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def param(self, param: Tensor) -> nn.Parameter:
        return nn.Parameter(param.detach().to(self._cast(param, self._param_dtype)), param.requires_grad)

    def _like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.detach().to(dtype, copy=True)


def _trace(model: nn.Module, sample: Sample, loss: LossOf | None, stand_ins: _Fakes) -> Activations:
    params = {param: stand_ins.param(param) for param in model.parameters()}
    made: dict[Tensor, Tensor] = {buffer: stand_ins.buffer(buffer) for buffer in model.buffers()}
    made |= params  # type: ignore[arg-type]
    inputs = tree_map(stand_ins.input, sample)
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    live = LiveBytes([*made.values(), *given], stand_ins.granule)
    taken = _Taken(live)
    for name, param in model.named_parameters():
        if param.requires_grad:
            params[param].register_post_accumulate_grad_hook(taken.hook_for(name))  # type: ignore[no-untyped-call]
    names = {"model." + name: made[value] for name, value in _all_named(model)}
    with stand_ins.running(), live:
        functional_call(_Pass(model, loss), names, (inputs,))
    return Activations(tuple(taken.order), tuple(taken.gradients), (*taken.peaks, live.most))


class _Pass(nn.Module):
    """A forward and its backward: what is recomputed in backward finds the same tensors in the place of parameters."""

    def __init__(self, model: nn.Module, loss: LossOf | None) -> None:
        super().__init__()
        self.model = model
        self._loss = loss or loss_of

    def forward(self, inputs: Sample) -> None:
        args, kwargs = arguments_of(inputs)
        self._loss(self.model(*args, **kwargs)).backward()  # type: ignore[no-untyped-call]


class _Taken:
    """Takes gradients away as soon as they are complete, as zeroopt does, and notes what was held before."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live
        self.order: list[str] = []
        self.gradients: list[int] = []
        self.peaks: list[int] = []

    def hook_for(self, name: str) -> Callable[[Tensor], None]:
        def take(param: Tensor) -> None:
            assert param.grad is not None
            self.order.append(name)
            self.gradients.append(param.grad.nbytes)
            param.grad = None
            self.peaks.append(self._live.restart())

        return take


def tokens_sample(model: nn.Module, tokens: int, batch: int = 1) -> Mapping[str, Tensor]:
    """Integers of shape [batch, tokens] for each argument that a language model's forward requires, and for `input_ids` and
    `labels` where it has these.

    Raises:
        ConfigError: there are none.
    """
    if tokens < 1 or batch < 1:
        raise ConfigError(f"expected tokens and batch to be positive, got {tokens} and {batch}")
    parameters = inspect.signature(model.forward).parameters
    known = [name for name in ("input_ids", "labels") if name in parameters]
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return {
        name: torch.empty((batch, tokens), dtype=torch.int64, device="meta")
        for name in dict.fromkeys([*known, *required])
    }


def arguments_of(sample: Sample) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Positional and named ones."""
    if isinstance(sample, Mapping):
        return (), sample
    return ((sample,) if isinstance(sample, Tensor) else sample), {}


def loss_of(output: Any) -> Tensor:
    """A number to begin a backward with, of whatever a model returns."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise ConfigError(
            f"expected the model to return a floating-point tensor, got {type(output).__name__}: pass loss=…, which makes the "
            "loss of what it returns"
        )
    return tensors[0] if tensors[0].dim() == 0 else tensors[0].sum()


def _all_named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by all of their names: tied ones have several."""
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _has_values(model: nn.Module, sample: Sample) -> bool:
    tensors = [*model.parameters(), *model.buffers(), *(x for x in tree_leaves(sample) if isinstance(x, Tensor))]
    return all(tensor.device.type == "cpu" for tensor in tensors)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs what it then raises, with its traceback."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
