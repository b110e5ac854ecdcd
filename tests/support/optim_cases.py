"""Parameters, gradients and comparisons that the tests of zeroopt.optim share."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zeroopt.optim import (
    FusedAdagrad,
    FusedAdam,
    FusedAdamW,
    FusedLAMB,
    FusedLion,
    FusedOptimizer,
    FusedRMSprop,
    FusedSGD,
)

Params = list[nn.Parameter]
Make = Callable[[Any], torch.optim.Optimizer]

TORCH_CLASSES: dict[type[torch.optim.Optimizer], type[FusedOptimizer]] = {
    torch.optim.AdamW: FusedAdamW,
    torch.optim.Adam: FusedAdam,
    torch.optim.SGD: FusedSGD,
    torch.optim.Adagrad: FusedAdagrad,
    torch.optim.RMSprop: FusedRMSprop,
}
ALL_CLASSES: list[type[FusedOptimizer]] = [*TORCH_CLASSES.values(), FusedLion, FusedLAMB]
# Options with which a class has all the state that it can have, and steps that 16 bits can show.
FULL: dict[type, dict[str, Any]] = {
    FusedAdamW: {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1},
    FusedAdam: {"lr": 1e-2, "weight_decay": 0.1},
    FusedSGD: {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
    FusedAdagrad: {"lr": 1e-2, "initial_accumulator_value": 0.125},
    FusedRMSprop: {"lr": 1e-2, "momentum": 0.9, "centered": True, "eps": 0.1, "weight_decay": 0.1},
    FusedLion: {"lr": 1e-3, "weight_decay": 0.1},
    FusedLAMB: {"lr": 1e-2},
}
STEPS = 6
# In units of the last place of a tensor's largest element. torch multiplies and adds in another order here and there.
ULPS_A_STEP = 4

F32, BF16, F16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
TIERS = [
    (F32, "float32"),
    (BF16, "float32"),
    (F16, "float32"),
    (BF16, "remainder"),
    (BF16, "none"),
]
STATE_DTYPES = [F32, BF16, INT8]
TIER_IDS = [f"{str(dtype)[6:]}-{weights}" for dtype, weights in TIERS]


def values(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_params(dtype: torch.dtype = F32) -> Params:
    """Every kind of shape, and of memory without gaps."""
    tensors = [
        values(seed=8),  # with which no average of its few gradients is what is left of much larger ones
        values(0, seed=2),
        values(1, seed=3),
        values(33, 7, seed=4),
        values(4, 3, 5, 2, seed=5).contiguous(memory_format=torch.channels_last),
        values(9, 6, seed=6).t(),
        values(517, seed=7),
    ]
    return [nn.Parameter(tensor.to(dtype)) for tensor in tensors]


def set_grads(params: Params, step: int, scale: float = 1.0) -> None:
    """The gradients of a step: some missing, some with other strides than their parameter."""
    for number, param in enumerate(params):
        grad = (values(*param.shape, seed=1000 * step + number) * scale).to(param.dtype)
        if (number + step) % 3 == 0 and grad.dim() == 2:
            grad = grad.t().contiguous().t()
        param.grad = None if (number + step) % 5 == 4 else grad


def two_groups(params: Params, lr: float | Tensor | None = None) -> list[dict[str, Any]]:
    second = {} if lr is None else {"lr": lr / 2}
    return [{"params": params[::2]}, {"params": params[1::2], **second}]


def train(optimizer: torch.optim.Optimizer, params: Params, first: int, last: int) -> None:
    for step in range(first, last):
        set_grads(params, step)
        optimizer.step()
    for param in params:
        param.grad = None


def clone(params: Params) -> Params:
    """With their memory layout."""
    return [nn.Parameter(param.detach().clone()) for param in params]


def assert_equal(ours: Any, theirs: Any) -> None:
    """Bit for bit, of nested containers too."""
    if isinstance(theirs, (dict, list, tuple)):
        assert len(ours) == len(theirs)
        keys = theirs.keys() if isinstance(theirs, dict) else range(len(theirs))
        for key in keys:
            assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, Tensor):
        assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours.detach(), theirs.detach())
    else:
        assert ours == theirs


def assert_close(ours: Tensor, theirs: Tensor, ulps: float) -> None:
    assert ours.shape == theirs.shape
    if torch.equal(ours.detach(), theirs.detach()):
        return
    largest = theirs.detach().abs().max()
    ulp = torch.nextafter(largest, largest * 2) - largest
    difference = float((ours.detach() - theirs.detach()).abs().max() / ulp)
    assert difference <= ulps, f"differs by {difference:.1f} ulp, {ulps} allowed"


def assert_follows(
    ours: torch.optim.Optimizer, our_params: Params, theirs: torch.optim.Optimizer, their_params: Params, ulps: float
) -> None:
    """Parameters, and state by name. Empty parameters have no state here."""
    for our, their in zip(our_params, their_params, strict=True):
        assert_close(our, their, ulps)
        if not their.numel():
            continue
        assert ours.state[our].keys() == theirs.state[their].keys()
        for name, value in theirs.state[their].items():
            assert_close(ours.state[our][name], value, ulps)


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def params_of(optimizer: torch.optim.Optimizer) -> Params:
    """In the order of `make_params`, of an optimizer over `two_groups` of them."""
    first, second = (group["params"] for group in optimizer.param_groups)
    result: Params = []
    for i in range(len(first) + len(second)):
        result.append((second if i % 2 else first)[i // 2])
    return result


def continue_both(optimizer: torch.optim.Optimizer, params: Params, other: torch.optim.Optimizer) -> None:
    """Both go on from step 3, and stay together."""
    train(optimizer, params, 3, 3 + STEPS)
    train(other, params_of(other), 3, 3 + STEPS)
    for mine, theirs in zip(params_of(other), params, strict=True):
        assert_close(mine, theirs, ULPS_A_STEP * STEPS)


def state_names(cls: type[FusedOptimizer]) -> dict[str, bool]:
    """The moments of FULL[cls], and whether they can be negative."""
    rule = cls.fused_rule
    signed = dict(zip(rule.kernel.states, rule.kernel.signed, strict=True))
    return {name: signed[name] for name in rule.names_in_use({"amsgrad": False, **FULL[cls]})}


def expected_dtypes(cls: type[FusedOptimizer], dtype: torch.dtype, weights: str, state: torch.dtype) -> dict[str, Any]:
    """What the documentation promises for a parameter's state."""
    is_stochastic = weights == "none" or state is not F32
    result: dict[str, Any] = {"step": F32} if cls.fused_rule.has_step or is_stochastic else {}
    if dtype is not F32 and weights != "none":
        result |= {"master_param": F32} if weights == "float32" else {"remainder": torch.int16}
    for name, signed in state_names(cls).items():
        result[name] = torch.uint8 if state is INT8 and not signed else state
        if state is INT8:
            result[name + "_scale"] = F32
    return result


def tier_options(cls: type[FusedOptimizer], weights: str, state: torch.dtype) -> dict[str, Any]:
    return {**FULL[cls], "master_weights": weights, "state_dtype": state, "seed": 3}
