"""How small may the pieces be in which ranks share an optimizer's work: elements, or whole parameters?

Rather than keep a list of names, ask the optimizer. For each of its param_groups it steps small tensors: by themselves, next
to others, and cut into flat pieces. A rule that looks at rows, matrices or norms of a parameter gives other numbers for the
pieces, and gets whole parameters. One for which it matters what else is stepped cannot be shared by ranks at all.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .bucket import Grain
from .errors import NotSupportedError
from .local_tensor import local_of

# By number of dimensions, and of more ones at the end; all have 30 elements.
_SHAPES = {0: (30,), 1: (30,), 2: (6, 5), 3: (3, 2, 5)}
_CUTS = (0, 7, 8, 30)
_STEPS = 3
# Of the gradients of other parameters, in each step: they change a norm over all, and not by the same factor each time,
# which would be lost on rules that normalise.
_SCALES = (1e4, 1.0, 1e2)
_LR = 0.01
# Far above rounding, far below what a different rule gives.
_TOLERANCE = 1e-4
_ADVICE = (
    "zeroopt lets ranks step different parameters, or different pieces of one, which is right only where a step needs "
    "the gradient and the state of that parameter and nothing else"
)


def find_grains(optimizer: torch.optim.Optimizer, groups: Sequence[int] | None = None) -> list[Grain]:
    """For each param_group the smallest pieces that it can be stepped in. The optimizer itself is left alone.

    Args:
        groups: positions of the param_groups that are tried; all of them when None.

    Raises:
        NotSupportedError: it cannot step a parameter by itself, or steps it differently when there are others.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise NotSupportedError(f"LBFGS calls the model several times a step and looks at all parameters. {_ADVICE}")
    grains = []
    for number in range(len(optimizer.param_groups)) if groups is None else groups:
        shapes = {_shape_like(param) for param in optimizer.param_groups[number]["params"] if param.requires_grad}
        grains.append(max((_find_grain(optimizer, number, shape) for shape in sorted(shapes)), default=Grain.ELEMENT))
    return grains


def _shape_like(param: Tensor) -> tuple[int, ...]:
    """Some rules depend on the number of dimensions."""
    dim = param.dim()
    return _SHAPES[dim] if dim in _SHAPES else _SHAPES[3] + (1,) * (dim - 3)


def _find_grain(optimizer: torch.optim.Optimizer, group: int, shape: tuple[int, ...]) -> Grain:
    name = type(optimizer).__name__
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(shape, generator=generator) for _ in range(1 + _STEPS))
    others = [(-grad.roll(1) * scale).contiguous() for grad, scale in zip(grads, _SCALES, strict=True)]
    between = [[other, grad, other] for other, grad in zip(others, grads, strict=True)]
    try:
        alone = _change(optimizer, group, [start], [[grad] for grad in grads])[0]
        in_company = _change(optimizer, group, [-2 * start, start, 3 * start], between)[1]
    except Exception as error:
        raise NotSupportedError(
            f"{name} could not step a parameter of {len(shape)} dimensions by itself ({type(error).__name__}: {error}). "
            f"{_ADVICE}"
        ) from error
    if not _is_same(alone, in_company):
        raise NotSupportedError(
            f"{name} steps a parameter differently when others are stepped with it, as with a norm over all of them (for "
            f"clipping, call clip_grad_norm_ of the optimizer that zeroopt.wrap returns). {_ADVICE}"
        )
    try:
        pieces = _change(optimizer, group, _cut(start), [_cut(grad) for grad in grads])
    except Exception:  # noqa: BLE001
        return Grain.MATRIX
    return Grain.ELEMENT if _is_same(alone.flatten(), torch.cat(pieces)) else Grain.PARAMETER


def _cut(value: Tensor) -> list[Tensor]:
    return [value.flatten()[begin:end] for begin, end in pairwise(_CUTS)]


def _is_same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE * float(one.abs().max()) * 1e-3)


def _change(
    optimizer: torch.optim.Optimizer, group: int, starts: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """Changes of parameters by a few steps under one group's options; `grads` has those of each step."""
    try:
        return _change_from(optimizer, group, starts, grads, with_state=False)
    except Exception:
        # Some optimizers make their state in the constructor and count on it.
        if not any(optimizer.state.get(param) for param in optimizer.param_groups[group]["params"]):
            raise
        return _change_from(optimizer, group, starts, grads, with_state=True)


def _change_from(
    optimizer: torch.optim.Optimizer,
    group: int,
    starts: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    *,
    with_state: bool,
) -> list[Tensor]:
    params = [nn.Parameter(start.clone()) for start in starts]
    probe = _copy_with(optimizer, group, params, with_state=with_state)
    with _NoCommunication():  # type: ignore[no-untyped-call]
        for grads_of_step in grads:
            for param, grad in zip(params, grads_of_step, strict=True):
                param.grad = grad.clone()
            step_without_hooks(probe)
    return [param.detach() - start for param, start in zip(params, starts, strict=True)]


class _NoCommunication(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses collectives: ranks that step different parameters would wait in them for each other."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional"):
            raise NotSupportedError("its step communicates with other ranks, which is zeroopt's part")
        return func(*args, **(kwargs or {}))


def _copy_with(
    optimizer: torch.optim.Optimizer, group: int, params: list[nn.Parameter], *, with_state: bool
) -> torch.optim.Optimizer:
    """An optimizer of the same class and options over other parameters, without hooks."""
    probe: torch.optim.Optimizer = object.__new__(type(optimizer))
    own = {p: p for g in optimizer.param_groups for p in g["params"]}
    memo: dict[int, Any] = {id(p): p for p in own}  # references to parameters stay references
    for name, value in vars(optimizer).items():
        # A scheduler has replaced `step` by a closure over the real optimizer, and zeroopt.wrap some other methods.
        if name in ("param_groups", "state", "step", "zero_grad", "add_param_group"):
            continue
        vars(probe)[name] = OrderedDict() if name.endswith("_hooks") else copy.deepcopy(value, memo)
    options = copy.deepcopy({k: v for k, v in optimizer.param_groups[group].items() if k != "params"}, memo)
    options.pop("param_names", None)
    # A warm-up may have set lr to 0, with which all rules look alike; capturable steps want a device.
    options.update({k: v for k, v in (("lr", _LR), ("capturable", False)) if k in options})
    probe.param_groups = [{**options, "params": params}]
    probe.state = defaultdict(dict)
    if with_state:
        probe.state.update({param: _state_like(optimizer, group, param) for param in params})
    return probe


def _state_like(optimizer: torch.optim.Optimizer, group: int, param: nn.Parameter) -> dict[str, Any]:
    """State for a probe's parameter, like what the optimizer has."""
    state = optimizer.state
    # 0-dim parameters show least of what is kept for each element.
    models = sorted(optimizer.param_groups[group]["params"], key=lambda p: p.dim(), reverse=True)
    model = next((p for p in models if state.get(p) and local_of(p).numel()), None)
    if model is None:
        return {}
    return {
        name: torch.full_like(param, local_of(value).flatten()[0].item())
        if is_per_element(name, value, model)
        else copy.deepcopy(value)
        for name, value in state[model].items()
    }


def step_without_hooks(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's own step, without its step hooks, the global ones and its range in a profile: those belong to a step of
    the user's."""
    step = type(optimizer).step
    if getattr(step, "hooked", False):  # by torch, when the first optimizer of the class was made
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)


def is_per_element(name: str, value: Any, param: Tensor) -> bool:
    """Whether an entry of a parameter's state holds one value for each of its elements, as moments do."""
    # The step count of a 0-dim parameter has the parameter's shape too.
    return isinstance(value, Tensor) and name != "step" and value.shape == param.shape
