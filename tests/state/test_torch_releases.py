"""What optimizers of any torch release since 2.0 have saved loads, and training goes on as it does there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import FULL, TORCH_CLASSES, assert_equal, clone, make_params, train
from state_cases import MAKERS, Run, Varied, assert_alike
from torch import Tensor
from worker_pool import RunOnRanks

from zeroopt.state.torch_releases import brought_up_to_date

StateDict = dict[str, Any]
HOW = ("fused", "foreach", "capturable", "differentiable")
NEWER = ("decoupled_weight_decay", "fused", "capturable", "param_names")  # options that some class did not have in 2.0


def edited(state_dict: StateDict, entry: Callable[[StateDict], StateDict], **options: Any) -> StateDict:
    """A copy with other entries, and other options of all groups; None for those that are to be missing."""
    result: StateDict = copy.deepcopy(state_dict)
    result["state"] = {position: entry(one) for position, one in result["state"].items()}
    result["param_groups"] = [
        {name: value for name, value in {**group, **options}.items() if name not in options or value is not None}
        for group in result["param_groups"]
    ]
    return result


def with_step(change: Callable[[Tensor], Any]) -> Callable[[StateDict], StateDict]:
    return lambda entry: {n: change(v) if n == "step" and isinstance(v, Tensor) else v for n, v in entry.items()}


RELEASES: dict[str, Callable[[StateDict], StateDict]] = {
    "without what came later": lambda saved: edited(saved, dict, **dict.fromkeys(NEWER)),
    "integers": lambda saved: edited(saved, with_step(lambda step: int(step.item())), **dict.fromkeys(NEWER)),
    "floats": lambda saved: edited(saved, with_step(lambda step: step.item())),
    "fused 2.0": lambda saved: edited(saved, with_step(lambda step: step.reshape(1)), fused=True),
    "capturable 2.0": lambda saved: edited(saved, with_step(lambda step: step.reshape(1)), capturable=True),
    "fused": lambda saved: edited(saved, dict, fused=True, foreach=False),
    "foreach, differentiable": lambda saved: edited(saved, dict, foreach=True, differentiable=True),
    "capturable": lambda saved: edited(saved, dict, capturable=True),
    "buffers of None": lambda saved: edited(saved, lambda entry: {**entry, "momentum_buffer": None, **entry}),
    "names": lambda saved: edited(saved, dict, param_names=["a", "b"]),
}


def resume_all(name: str, releases: list[str], fused: bool) -> None:
    plain = Run(name, None)
    plain.train(3)
    saved = copy.deepcopy(plain.optimizer.state_dict())
    model = copy.deepcopy(plain.net.state_dict())
    plain.train(2)
    run = Run(name, {"stage": 2, "bucket_mb": 0.002, "fused": fused})
    how = {key: run.optimizer.param_groups[0].get(key) for key in HOW}
    for release in releases:
        run.model.load_state_dict(model)
        run.optimizer.load_state_dict(RELEASES[release](saved))
        run.step = 3
        run.train(2)
        assert_alike(plain.params(), run.params(), f"{name}, {release}", exact=not fused)
        assert {key: run.optimizer.param_groups[0].get(key) for key in how} == how, release


@pytest.mark.parametrize(
    ("name", "releases", "fused"),
    [
        ("adamw", ["without what came later", "integers", "fused 2.0", "capturable"], False),
        ("adamw_amsgrad", ["integers", "fused 2.0"], True),
        ("rmsprop_centered", ["integers", "without what came later"], False),
        ("sgd", ["buffers of None"], False),
    ],
    ids=str,
)
def test_wrapped_optimizers(run_on_ranks: RunOnRanks, name: str, releases: list[str], fused: bool) -> None:
    run_on_ranks(2, resume_all, name, releases, fused)


def stepped(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[Tensor]:
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return [param.detach().clone() for param in params]


ANY = ["without what came later", "integers", "floats", "fused", "names"]
SAVED_BY = {name: ANY for name in MAKERS if name not in ("nested", "lars", "lamb")}
SAVED_BY |= {"adamw": [release for release in RELEASES if "None" not in release], "sgd": [*ANY, "buffers of None"]}
CASES = [(name, release) for name, releases in SAVED_BY.items() for release in releases]


@pytest.mark.parametrize(("name", "release"), CASES)
def test_is_what_torch_makes_of_it(name: str, release: str) -> None:
    """For each of its optimizers: as after torch's own `load_state_dict`."""
    saved_net, net, their_net = (Varied() for _ in range(3))
    saving, ours, theirs = (MAKERS[name](one) for one in (saved_net, net, their_net))
    for param in saved_net.parameters():
        param.grad = torch.ones_like(param)
    saving.step()
    saved = RELEASES[release](saving.state_dict())
    params = [group["params"] for group in ours.param_groups]
    order = [param for members in params for param in members]
    state = {order[position]: dict(entry) for position, entry in saved["state"].items()}
    state, options = brought_up_to_date(ours, state, saved["param_groups"], params)
    ours.state.update(state)
    for group, new in zip(ours.param_groups, options, strict=True):
        group.update(new)
    ways = {key for key in HOW if key in ours.param_groups[0]}
    theirs.load_state_dict(copy.deepcopy(saved))
    for group, own in zip(theirs.param_groups, ours.param_groups, strict=True):
        group.update({key: own[key] for key in ways})
    their_net.load_state_dict(net.state_dict())
    for _ in range(2):
        mine = stepped(ours, [p for group in ours.param_groups for p in group["params"]])
        expected = stepped(theirs, [p for group in theirs.param_groups for p in group["params"]])
        assert_equal(mine, expected)
    expected_state = edited(theirs.state_dict(), with_step(lambda step: step.reshape(())))["state"]
    assert_equal(ours.state_dict()["state"], expected_state)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_zeroopts_own(cls: type[torch.optim.Optimizer], release: str) -> None:
    own = TORCH_CLASSES[cls]
    params = make_params()
    theirs = cls(params, **FULL[own])
    train(theirs, params, 0, 3)
    results = []
    for given in (theirs.state_dict(), RELEASES[release](theirs.state_dict())):
        others = clone(params)
        ours = own(others, **FULL[own])
        how = {key: ours.param_groups[0].get(key) for key in HOW}
        ours.load_state_dict(given)
        train(ours, others, 3, 6)
        assert {key: ours.param_groups[0].get(key) for key in how} == how
        results.append((others, ours.state_dict()["state"]))
    assert_equal(results[1], results[0])


def test_buffers_of_none_are_no_state_to_look_for_again() -> None:
    """torch's SGD without momentum saved them; batches are to be made once."""
    params = make_params()
    ours = TORCH_CLASSES[torch.optim.SGD](params, lr=0.1)
    plain = torch.optim.SGD(params, lr=0.1).state_dict()
    ours.load_state_dict({**plain, "state": {i: {"momentum_buffer": None} for i in range(len(params))}})
    train(ours, params, 0, 1)
    (batch,) = ours._batches.values()
    train(ours, params, 5, 6)  # the same parameters have gradients
    assert list(ours._batches.values()) == [batch]


def test_nothing_of_the_optimizer_changes() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([param], lr=0.5)
    entry = {"step": 7, "exp_avg": torch.ones(3)}
    group = {"lr": 0.25, "params": [0], "fused": True}
    state, options = brought_up_to_date(optimizer, {param: entry}, [group], [[param]])
    assert state[param]["step"].item() == 7 and options[0]["lr"] == 0.25 and options[0]["betas"] == (0.9, 0.999)
    assert entry["step"] == 7 and not optimizer.state and optimizer.param_groups[0]["lr"] == 0.5
    assert "params" not in options[0] and not options[0]["fused"]
