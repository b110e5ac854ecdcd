"""Does an optimizer treat every element by itself? Only then may its parameters be cut into flat pieces.

Rather than keep a list of names, ask the optimizer: it steps small tensors, once whole and in shape and once cut into flat
pieces. An element-wise rule gives the same numbers both times; a rule that looks at rows, matrices or norms does not.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NotSupportedError

_SHAPE = (6, 5)
_CUTS = (0, 7, 8, 30)
_STEPS = 3
_LR = 0.01
# Far above rounding, far below what a different rule gives.
_TOLERANCE = 1e-4
_ADVICE = (
    "zeroopt shards an optimizer's state by cutting parameters into flat pieces, which is right only for element-wise "
    "optimizers (SGD, Adam, AdamW, Adagrad, RMSprop and the like); optimizers that need whole matrices or norms of whole "
    "parameters (Adafactor, LBFGS, Muon, LAMB) are not supported yet"
)


def check_elementwise(optimizer: torch.optim.Optimizer, groups: Iterable[int] | None = None) -> None:
    """Raise NotSupportedError unless the optimizer's step is element-wise. The optimizer itself is left alone.

    Args:
        groups: positions of the param_groups whose options are tried; all of them when None.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise NotSupportedError(f"LBFGS is not element-wise: it calls the model several times a step. {_ADVICE}")
    for number in range(len(optimizer.param_groups)) if groups is None else groups:
        try:
            whole, pieces = _step_whole_and_cut(optimizer, number)
        except Exception as error:
            raise NotSupportedError(
                f"{name} could not step flat pieces of parameters ({type(error).__name__}: {error}). {_ADVICE}"
            ) from error
        if not torch.allclose(whole, pieces, rtol=_TOLERANCE, atol=_TOLERANCE * float(whole.abs().max()) * 1e-3):
            raise NotSupportedError(f"{name} is not element-wise: a cut parameter steps differently. {_ADVICE}")


def _step_whole_and_cut(optimizer: torch.optim.Optimizer, group: int) -> tuple[Tensor, Tensor]:
    """Change of a parameter by a few steps under one group's options: stepped whole, and stepped in flat pieces."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(_SHAPE, generator=generator)
    grads = [torch.randn(_SHAPE, generator=generator) for _ in range(_STEPS)]
    whole = [nn.Parameter(start.clone())]
    pieces = [nn.Parameter(start.flatten()[a:b].clone()) for a, b in pairwise(_CUTS)]
    for params in (whole, pieces):
        probe = _copy_with(optimizer, group, params)
        for grad in grads:
            for param, part in zip(params, _parts(grad, params), strict=True):
                param.grad = part
            probe.step()
    return whole[0].detach() - start, torch.cat([p.detach() for p in pieces]).view(_SHAPE) - start


def _parts(grad: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    flat = torch.split(grad.flatten(), [p.numel() for p in params])
    return [part.clone().view(param.shape) for part, param in zip(flat, params, strict=True)]


def _copy_with(optimizer: torch.optim.Optimizer, group: int, params: list[nn.Parameter]) -> torch.optim.Optimizer:
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
    probe.state = defaultdict(dict, {param: _state_like(optimizer, group, param) for param in params})
    return probe


def _state_like(optimizer: torch.optim.Optimizer, group: int, param: nn.Parameter) -> dict[str, Any]:
    """State for a probe's parameter. Some optimizers make it in their constructor and count on it: take it from there."""
    state = optimizer.state
    # 0-dim parameters show least of what is kept for each element.
    models = sorted(optimizer.param_groups[group]["params"], key=lambda p: p.dim(), reverse=True)
    model = next((p for p in models if state.get(p) and p.numel()), None)
    if model is None:
        return {}
    return {
        name: torch.full_like(param, value.flatten()[0].item())
        if is_per_element(name, value, model)
        else copy.deepcopy(value)
        for name, value in state[model].items()
    }


def is_per_element(name: str, value: Any, param: Tensor) -> bool:
    """Whether an entry of a parameter's state holds one value for each of its elements, as moments do."""
    # The step count of a 0-dim parameter has the parameter's shape too.
    return isinstance(value, Tensor) and name != "step" and value.shape == param.shape
