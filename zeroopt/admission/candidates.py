"""What `zeroopt.wrap` looks at before it changes anything: the model, the optimizer, and whether they fit together."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from ..errors import ConfigError, NotSupportedError
from ..gradients.sharded_tensor import ShardedGradient
from ..optim import FusedOptimizer
from ..plan.claims import check_unclaimed, claimed_params, is_claimed
from ..plan.dtensors import check_state_parts, is_distributed, local_of, manage
from ..plan.params import ManagedParam
from ..probing.grains import find_grains
from ..stepping.step_counts import check_count
from .devices import check_device, check_stepped_on
from .memory_overlap import check_expanded, check_overlaps

_log = logging.getLogger("zeroopt")

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Models and optimizers that went into zeroopt.wrap or came out of it; a second time would cut shards once more.
_wrapped: weakref.WeakSet[nn.Module | torch.optim.Optimizer] = weakref.WeakSet()


def mark_wrapped(*objects: nn.Module | torch.optim.Optimizer) -> None:
    """Remember models and optimizers that must not be wrapped (again)."""
    _wrapped.update(objects)


def forget_wrapped(*objects: nn.Module | torch.optim.Optimizer) -> None:
    """Models and optimizers may be wrapped again."""
    for one in objects:
        _wrapped.discard(one)


def inspect(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    known: Sequence[ManagedParam] = (),
    home: torch.device | None = None,
) -> list[ManagedParam]:
    """The parameters that zeroopt will train, in the model's order. Changes nothing, and is not collective.

    Those are the optimizer's parameters that require gradients now.

    Args:
        known: those that other optimizers of the model train.
        home: where it is to step; None: where the parameters are.

    Raises:
        ConfigError: model, optimizer and parameters do not fit together or cannot be trained.
        NotSupportedError: something this release cannot train yet.
        KernelUnavailableError: there are no kernels for the device, or they do not run there, and nothing else will do.
    """
    _check_types(model, optimizer, further=bool(known))
    params = inspect_further(model, optimizer, known, home=home)
    if not params:
        raise ConfigError("no parameter of the optimizer requires gradients: there is nothing to train")
    _check_sparse(model)
    _warn_untrained(model, [*known, *params])
    return params


def inspect_further(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    known: Sequence[ManagedParam],
    own: Sequence[ManagedParam] = (),
    fresh: Sequence[int] | None = None,
    home: torch.device | None = None,
) -> list[ManagedParam]:
    """The parameters of an optimizer that require gradients and are not yet trained, in the model's order. Changes nothing, and
    is not collective.

    Args:
        known: those that are trained.
        own: those of them that this optimizer trains.
        fresh: positions of the groups that are looked at for the first time; all of them when None.
        home: as `inspect`.

    Raises:
        ConfigError, NotSupportedError, KernelUnavailableError: as `inspect`.
    """
    params = _managed_params(model, optimizer, known, own)
    if params:
        _check_devices([*known, *params])
        check_stepped_on(optimizer, home or params[0].param.device)
        check_overlaps(model, params)
        check_expanded(model)
        check_state_parts(params, optimizer.state)
        for managed in params:
            check_count(managed.name, optimizer.state.get(managed.param, {}), type(optimizer).__name__)
    fresh = range(len(optimizer.param_groups)) if fresh is None else fresh
    groups = sorted({*fresh, *(m.group for m in params)})
    grains = dict(zip(groups, find_grains(optimizer, groups, home), strict=True))
    for managed in params:
        managed.grain = grains[managed.group]
    _check_whole_parts(params)
    return params


def _check_types(model: nn.Module, optimizer: torch.optim.Optimizer, *, further: bool) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, DistributedDataParallel):
        raise ConfigError("expected a plain module, got a DistributedDataParallel; wrap the module inside it instead")
    if (model in _wrapped or is_claimed(model)) and not further:
        raise ConfigError(
            "this model is already wrapped; to train it with one more optimizer, wrap what zeroopt.wrap returned"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        got = "None" if optimizer is None else type(optimizer).__name__
        raise ConfigError(
            f"expected optimizer to be a torch.optim.Optimizer instance, got {got}: pass the one that trains the model, such as "
            "torch.optim.AdamW(model.parameters(), lr=3e-4); a model that is not trained needs no wrapping"
        )
    if isinstance(optimizer, FusedOptimizer) and not optimizer.has_default_precision:
        raise ConfigError(
            f"this {type(optimizer).__name__} was built with master_weights or state_dtype of its own; give these options to "
            "zeroopt.wrap instead"
        )
    if optimizer in _wrapped:
        raise ConfigError("this optimizer is already wrapped; call zeroopt.wrap once for each optimizer")


def _managed_params(
    model: nn.Module, optimizer: torch.optim.Optimizer, known: Sequence[ManagedParam], own: Sequence[ManagedParam]
) -> list[ManagedParam]:
    names = {param: name for name, param in model.named_parameters()}
    places: dict[Tensor, tuple[int, int]] = {}
    for group_index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if param not in names:
                raise ConfigError(
                    f"parameter {len(places)} of the optimizer (group {group_index}, shape {list(param.shape)}) is not a "
                    "parameter of the model; build the optimizer on model.parameters() of the model that is wrapped"
                )
            if param in places:
                raise ConfigError(f"parameter {names[param]!r} is in the optimizer twice")
            places[param] = (group_index, len(places))
    if not places:
        raise ConfigError("the optimizer has no parameters; build it on model.parameters()")
    trained, own_params = {m.param for m in known}, {m.param for m in own}
    check_unclaimed((name, p) for p, name in names.items() if p in places and p.requires_grad and p not in trained)
    managed: list[ManagedParam] = []
    for param, name in names.items():
        if param not in places or not param.requires_grad or param in own_params:
            continue
        if param not in trained:
            _check_param(name, param)
            managed.append(manage(name, param, len(known) + len(managed), *places[param]))
        else:
            raise ConfigError(f"parameter {name!r} is already trained by another optimizer of this model")
    return managed


def _check_param(name: str, param: nn.Parameter) -> None:
    if is_lazy(param):  # to torch 2.4, tensors of other subclasses are UninitializedParameters, too
        raise ConfigError(f"parameter {name!r} is not initialised yet; run the model once before wrapping")
    if param.is_meta:
        raise ConfigError(f"parameter {name!r} is on the meta device; materialise the model (to_empty) before wrapping")
    local = local_of(param.data)
    if type(local) is not Tensor:
        raise NotSupportedError(
            f"parameter {name!r} is a {type(local).__name__}; only plain tensors are supported, and DTensors of them with "
            "torch 2.5 or newer"
        )
    if param.layout is not torch.strided or param.dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(map(str, SUPPORTED_DTYPES))
        raise NotSupportedError(f"parameter {name!r} is {param.layout} {param.dtype}; supported are dense {supported}")
    if isinstance(param.grad, ShardedGradient) and param.grad.is_stray:
        raise ConfigError(
            f"parameter {name!r} has a sharded gradient of a wrapped model that is gone; clear it (model.zero_grad()) before "
            "wrapping the model anew"
        )
    # torch keeps the strides of a dense tensor for one like it, and no others.
    if torch.empty_like(local, device="meta").stride() != local.stride():
        raise ConfigError(f"parameter {name!r} has gaps or overlaps in memory; make its data contiguous()")


def _check_devices(params: Sequence[ManagedParam]) -> None:
    devices = {managed.param.device: managed.name for managed in params}
    if len(devices) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise NotSupportedError(f"all parameters of a rank must be on one device, got {places}")
    check_device(params[0].param.device)


def _check_whole_parts(params: Sequence[ManagedParam]) -> None:
    for managed in params:
        if managed.is_whole and is_distributed(managed.param):
            raise NotSupportedError(
                f"parameter {managed.name!r} is a DTensor, of which no rank has the whole, and its optimizer needs whole "
                "parameters; train it with an element-wise optimizer"
            )


def _check_sparse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise NotSupportedError(
                f"module {name!r} yields sparse gradients, which buckets cannot hold; build it with sparse=False"
            )


def _warn_untrained(model: nn.Module, params: Sequence[ManagedParam]) -> None:
    managed = {m.param for m in (*params, *claimed_params())}
    left = [name for name, param in model.named_parameters() if param.requires_grad and param not in managed]
    if left:
        _log.warning(
            "%d parameters require gradients but are not in the optimizer. Unless a further optimizer for them is wrapped, nothing "
            "steps them, and averaging their gradients costs time in each backward, which requires_grad_(False) saves: %s%s",
            len(left),
            ", ".join(left[:5]),
            ", …" if len(left) > 5 else "",
        )
