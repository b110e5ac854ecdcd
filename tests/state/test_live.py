"""What `optimizer.state` shows, and what becomes of changes to it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from state_cases import TIERS, Run, assert_alike, whole_state
from worker_pool import RunOnRanks

import zeroopt

Reset = Callable[[Any], None]


def params_of(optimizer: Any) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def names_of_both() -> None:
    """torch takes the names of a flattened state dict from `optimizer.state`: they are those of the state dict."""
    for name, tier in (("adamw_amsgrad", "master"), ("adamw", "int8 with remainder"), ("sgd_momentum", "int8")):
        run = Run(name, {"stage": 2, "bucket_mb": 0.002, **TIERS[tier]})
        assert run.optimizer.state == {} and not run.optimizer.state_dict()["state"]
        run.train(3)
        saved, params = run.optimizer.state_dict()["state"], params_of(run.optimizer)
        assert set(run.optimizer.state) == {params[position] for position in saved}
        for position, entry in saved.items():
            assert set(run.optimizer.state[params[position]]) == set(entry), f"{tier}, {name}"


def set_to_nothing(optimizer: Any) -> None:
    optimizer.state = {}


def set_to_defaults(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict)


def clear(optimizer: Any) -> None:
    optimizer.state.clear()


def clear_each(optimizer: Any) -> None:
    for entry in optimizer.state.values():
        entry.clear()


def delete_each(optimizer: Any) -> None:
    for param in list(optimizer.state):
        del optimizer.state[param]


def pop_each(optimizer: Any) -> None:
    for param in params_of(optimizer):
        optimizer.state.pop(param, None)


def assign_each(optimizer: Any) -> None:
    for param in params_of(optimizer):
        optimizer.state[param] = {}


RESETS: list[Reset] = [set_to_nothing, set_to_defaults, clear, clear_each, delete_each, pop_each, assign_each]


def begins_anew(resets: list[Reset], name: str, options: dict[str, Any]) -> None:
    """As an optimizer that has just been made does, with the same parameters."""
    for reset in resets:
        run = Run(name, {"stage": 2, "bucket_mb": 0.002, **options})
        run.train(3)
        run.optimizer.consolidate_state_dict()
        masters = [run.optimizer.full_parameter(p) for p in run.net.parameters() if p.requires_grad]
        reset(run.optimizer)
        assert len(run.optimizer.state) == 0 and not run.optimizer.state_dict()["state"]
        assert not whole_state(run.optimizer)["state"]
        fresh = Run(name, {"stage": 2, "bucket_mb": 0.002, **options})
        fresh.train(3)
        fresh.optimizer.load_state_dict({**fresh.optimizer.state_dict(), "state": {}})
        assert_alike(masters, [run.optimizer.full_parameter(p) for p in run.net.parameters() if p.requires_grad])
        for one in (run, fresh):
            one.step = 3
            one.train(2)
        assert_alike(fresh.params(), run.params(), reset.__name__)
        if name != "adagrad":  # which makes state of frozen parameters in its constructor
            assert_alike(whole_state(fresh.optimizer), whole_state(run.optimizer))


def resets_of_one() -> None:
    """The others go on, as under torch."""
    runs = [Run("adamw", None), Run("adamw", {"stage": 2, "bucket_mb": 0.002, "fused": False})]
    for run in runs:
        run.train(3)
        del run.optimizer.state[run.net.head.weight]
        run.train(2)
    assert_alike(*(run.params() for run in runs))
    assert run.optimizer.state.get(run.net.frozen.weight) is None
    with pytest.raises(KeyError):
        del run.optimizer.state[run.net.frozen.weight]


def changed_in_place(fused: bool) -> None:
    """What is assigned counts, whoever keeps the state."""
    run = Run("adamw", {"stage": 2, "bucket_mb": 0.002, "fused": fused})
    other = Run("adamw", {"stage": 2, "bucket_mb": 0.002, "fused": fused})
    for one in (run, other):
        one.train(3)
    for entry in run.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in entry:
                entry[name].zero_()
    state = other.optimizer.state
    for number, (param, entry) in enumerate(state.items()):
        zeros = {name: torch.zeros_like(value) for name, value in entry.items() if name != "step"}
        if number % 2:
            entry.update(zeros)
        else:
            state[param] = {**entry, **zeros}
    for one in (run, other):
        one.train(2)
    assert_alike(run.params(), other.params())
    moved = {param: copy.deepcopy(entry) for param, entry in state.items()}  # as frameworks move state to a device
    assert all(type(entry) is dict for entry in moved.values())
    for param, entry in moved.items():
        state[param] = entry
    for entry in moved.values():
        for value in entry.values():
            value.zero_()
    for one in (run, other):
        one.train(1)
    assert_alike(run.params(), other.params())


def refused() -> None:
    run = Run("adamw", {"stage": 2, "bucket_mb": 0.002})
    run.train(3)
    optimizer = run.optimizer
    before = whole_state(optimizer)
    mine = next(param for param, entry in optimizer.state.items() if entry)
    entry = optimizer.state[mine]
    whole = torch.zeros_like(mine, dtype=torch.float64)
    changes: list[Callable[[], Any]] = [
        lambda: setattr(optimizer, "state", {mine: dict(entry)}),
        lambda: optimizer.state.__setitem__(mine, {"exp_avg": entry["exp_avg"]}),
        lambda: optimizer.state.__setitem__(mine, {**entry, "exp_avg": whole}),
        lambda: entry.__setitem__("exp_avg", whole),
        lambda: entry.__setitem__("exp_avg", 0.0),
        lambda: entry.pop("exp_avg"),
        lambda: optimizer.state[run.net.frozen.weight].__setitem__("exp_avg", whole),
    ]
    for change in changes:
        with pytest.raises(zeroopt.StateError, match=r"load_state_dict\(\)"):
            change()
    kept = optimizer.state
    optimizer.state = kept  # as it is
    assert_alike(before, whole_state(optimizer))
    optimizer.state = {}
    with_new = optimizer.state
    run.train(1)
    assert with_new and kept
    with pytest.raises(zeroopt.StateError, match=r"load_state_dict\(\)"):
        optimizer.state = kept
    dist.barrier()


def test_shows_what_state_dict_has(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, names_of_both)


def test_resets(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, begins_anew, RESETS[:2], "adamw", {})
    run_on_ranks(2, begins_anew, RESETS[2:], "adamw", {"fused": False})
    run_on_ranks(2, begins_anew, RESETS[2:3], "adagrad", {})
    run_on_ranks(2, begins_anew, RESETS[:1], "adamw", TIERS["int8 with master"])
    run_on_ranks(2, resets_of_one)


@pytest.mark.parametrize("fused", [True, False])
def test_changes(run_on_ranks: RunOnRanks, fused: bool) -> None:
    run_on_ranks(2, changed_in_place, fused)


def test_refusals(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, refused)


@pytest.mark.parametrize("reset", RESETS, ids=lambda reset: reset.__name__)
def test_zeroopts_own_begin_anew(reset: Reset) -> None:
    """As torch's: the state of a fused optimizer of its own is a plain attribute."""
    results = []
    for cls in (torch.optim.AdamW, zeroopt.optim.FusedAdamW):
        param = torch.nn.Parameter(torch.ones(300))
        optimizer = cls([param], lr=0.1)
        for step in range(4):
            if step == 2:
                reset(optimizer)
                optimizer.state = defaultdict(dict, optimizer.state)
            param.grad = torch.linspace(-1, 1, 300) * (step + 1)
            optimizer.step()
        results.append((param.detach(), optimizer.state[param]["step"].item()))
    torch.testing.assert_close(*results)
