"""`zeroopt.unwrap`: the plain model and the plain optimizers again, with all that they have learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from .admission.candidates import forget_wrapped
from .errors import ConfigError, NotSupportedError, StateError
from .module import ZeroDataParallel
from .optimizer import ZeroOptimizer
from .plan.agreement import agree
from .plan.claims import release
from .stepping.part_state import kept_by_part


@overload
def unwrap(model: ZeroDataParallel) -> nn.Module: ...
@overload
def unwrap(model: ZeroDataParallel, optimizer: ZeroOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]: ...
@overload
def unwrap(
    model: ZeroDataParallel, optimizer: Sequence[ZeroOptimizer]
) -> tuple[nn.Module, list[torch.optim.Optimizer]]: ...
@torch.no_grad()
def unwrap(model: ZeroDataParallel, optimizer: ZeroOptimizer | Sequence[ZeroOptimizer] | None = None) -> Any:
    """Undo `zeroopt.wrap`: give back the model, with its parameters in memory of their own, and its optimizers.

    Collective: every rank of the process group must call it. Nothing of zeroopt is left in what it returns, so that can be wrapped
    again, or given to DistributedDataParallel or a Trainer. What `wrap` returned raises StateError from then on.

    Parameters stay the same objects. Those that `param_dtype` made 16-bit are of the dtype again that they had before, with the
    exact values of their masters or remainders (frozen ones stay rounded). Gradients are cleared.

    Args:
        model: what `zeroopt.wrap` returned.
        optimizer: what it returned with it, or a list of all optimizers of the model; None gives their state up.

    Returns:
        The model that was given to `wrap`; with `optimizer`, also the torch optimizer that was given to it (or a list of them), its
        `param_groups` the same objects, and on each rank the whole state, as under DistributedDataParallel.

    Raises:
        ConfigError: these are not a wrapped model and all its optimizers. On all ranks; nothing has been changed.
        NotSupportedError: parameters are DTensors, or parts of them (`matrix_splits`) have state that the optimizer could not have of
            the whole. On all ranks; nothing has been changed.
        StateError: within `join()`.
    """
    if not isinstance(model, ZeroDataParallel):
        raise ConfigError(f"expected the model that zeroopt.wrap returned, got {type(model).__name__}")
    replica, module = model.replica, model.module
    model.features.join.check_outside("zeroopt.unwrap")
    for one in model.optimizers:
        one.take_up_groups()
    single = isinstance(optimizer, ZeroOptimizer)
    given = [optimizer] if isinstance(optimizer, ZeroOptimizer) else list(optimizer or ())
    problem: Exception | None = None
    if replica.mesh is not None:
        problem = NotSupportedError("zeroopt.unwrap cannot yet take DTensors out of their buckets")
    elif given and (len(given) != len(model.optimizers) or {*map(id, given)} != {*map(id, model.optimizers)}):
        problem = ConfigError(
            f"expected all {len(model.optimizers)} optimizers that zeroopt.wrap returned with this model, got {len(given)} objects"
        )
    agree([(replica.control, [f"{len(given)} optimizers"])], problem or _problem_with_state(given), "zeroopt.unwrap")
    replica.reducer.discard()
    replica.gathers.finish_all()
    values = _exact_values(model)
    states = [_state_on_all_ranks(one) for one in given]
    replica.reducer.remove_hooks()
    replica.gathers.remove_hooks()
    if model.features.foresight is not None:
        model.features.foresight.forget()
    for param, value in values.items():
        param.grad = None
        param.data = value
    plain = [_retire(one) for one in model.optimizers]
    by_wrapped = dict(zip(map(id, model.optimizers), plain, strict=True))
    for one, state in zip(given, states, strict=True):
        _load(by_wrapped[id(one)], state)
    for one in model.optimizers:
        groups = one.param_groups
        _replace(one, UnwrappedOptimizer, keep=("defaults", "step"))
        vars(one)["param_groups"] = groups
    forget_wrapped(model, *plain)
    release(replica)
    _replace(model, UnwrappedModel)
    if optimizer is None:
        return module
    result = [by_wrapped[id(one)] for one in given]
    return (module, result[0] if single else result)


def _problem_with_state(optimizers: Sequence[ZeroOptimizer]) -> Exception | None:
    """State that plain optimizers could not go on from."""
    for one in optimizers:
        for managed in one.state_dicts.params:
            names = kept_by_part(one.state.get(managed.param, {}))
            if names:
                return NotSupportedError(
                    f"parameter {managed.name!r} was stepped in parts, of which each has {names[0]!r} for itself: a plain optimizer "
                    "steps it whole and cannot go on from that. Reset the state first, by optimizer.state.clear()"
                )
    return None


def _exact_values(model: ZeroDataParallel) -> dict[Tensor, Tensor]:
    """All parameters in memory of their own and in the dtypes that they had before wrapping. Collective."""
    dtypes = model.replica.dtypes
    values: dict[Tensor, Tensor] = {}
    for one in model.optimizers:
        for managed in one.state_dicts.params:
            values[managed.param] = one.full_parameter(managed.param)
    for param in model.module.parameters():
        if param not in values and param.dtype is not dtypes.get(param, param.dtype):
            values[param] = param.data
    return {param: value.to(dtypes.get(param, param.dtype)) for param, value in values.items()}


def _state_on_all_ranks(optimizer: ZeroOptimizer) -> dict[str, Any]:
    """Collective."""
    mine: dict[str, Any] | None = None
    for rank in range(optimizer.replica.control.size):
        whole = optimizer.state_dicts.whole(rank)
        mine = whole if rank == optimizer.replica.control.rank else mine
    assert mine is not None
    return mine


def _retire(optimizer: ZeroOptimizer) -> torch.optim.Optimizer:
    """The wrapped optimizer, without a trace and without state."""
    inner = optimizer.release()
    inner.state.clear()
    return inner


def _load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """As torch loads it, but into the groups that there are, which schedulers may hold."""
    groups, own = optimizer.param_groups, list(optimizer.param_groups)
    optimizer.load_state_dict({"state": state["state"], "param_groups": state["param_groups"]})
    for group, loaded in zip(own, optimizer.param_groups, strict=True):
        group.update(loaded)
    groups[:] = own
    optimizer.param_groups = groups


def _replace(wrapped: Any, cls: type, keep: Sequence[str] = ()) -> None:
    """Let an object be one that says what has become of it."""
    kept = {name: value for name, value in vars(wrapped).items() if name in keep}
    wrapped.__class__ = cls
    vars(wrapped).clear()
    vars(wrapped).update(kept)


def _refuse(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise StateError(
        "this object came from zeroopt.wrap, and zeroopt.unwrap has undone that: use what unwrap returned, or wrap it again"
    )


class UnwrappedModel(nn.Module):
    """What a wrapped model is after `unwrap`."""

    def __getattr__(self, name: str) -> Any:
        return _refuse(name)


class UnwrappedOptimizer(torch.optim.Optimizer):
    """What a wrapped optimizer is after `unwrap`. Schedulers made for it go on, since the groups are those of the plain one."""

    _opt_called = True  # which a scheduler looks at to warn of steps that were left out

    def __getattr__(self, name: str) -> Any:
        return _refuse(name)

    def step(self, closure: Any = None) -> Any:
        return _refuse("step")
