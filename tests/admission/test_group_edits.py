"""param_groups that a user edits hold from the next call on, as under torch and DDP, or all ranks refuse them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from follow import STAGES, WIDTH, Prepare, Prepared, follow, inputs, layers, values, with_ddp, with_zeroopt
from short_timeouts import lose_patience
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from training import SignMomentum, loss_of
from worker_pool import RunOnRanks

import zeroopt
import zeroopt.checkpoint

Net = nn.Sequential
Edit = Callable[[Net, torch.optim.Optimizer], object]


def grouped(net: Net, **options: Any) -> torch.optim.Optimizer:
    """A group for each of the first three layers. The last one is in none."""
    groups = [{"params": list(net[i].parameters()), "lr": 0.01 * (i + 1)} for i in range(3)]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, **options)


def remove(net: Net, optimizer: torch.optim.Optimizer) -> None:
    group = optimizer.param_groups[1]
    group["params"] = [param for param in group["params"] if param is not net[1].weight]
    del optimizer.param_groups[2]["params"][:]


def pop(net: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups.pop(0)


def move(net: Net, optimizer: torch.optim.Optimizer) -> None:
    param = optimizer.param_groups[2]["params"].pop(0)
    optimizer.add_param_group({"params": [param], "lr": 0.3})


def swap(net: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["params"].reverse()


def replace_list(net: Net, optimizer: torch.optim.Optimizer) -> None:
    first, second, third = optimizer.param_groups
    optimizer.param_groups = [second, {**first, "params": [*first["params"], *third["params"]], "lr": 0.05}]


def put_in(net: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"] += list(net[3].parameters())


def put_in_a_group(net: Net, optimizer: torch.optim.Optimizer) -> None:
    options = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    optimizer.param_groups.insert(0, {**options, "params": [net[3].bias], "lr": 0.2})
    optimizer.param_groups[2]["params"][0] = net[3].weight


def put_back(net: Net, optimizer: torch.optim.Optimizer) -> None:
    for index in range(3):
        group = next((g for g in optimizer.param_groups if g["lr"] == 0.01 * (index + 1)), None)
        if group is not None:
            group["params"] = list(net[index].parameters())


EDITS: list[Edit] = [remove, pop, move, swap, replace_list, put_in, put_in_a_group]


def train(edits: Sequence[Edit], moment: str, *, clips: bool = False) -> Callable[[Prepare], list[Tensor]]:
    """Edits come in steps 1, 3, …, and the state dict after them."""

    def run(prepare: Prepare) -> list[Tensor]:
        net = layers(4)
        model, optimizer = prepare(net, grouped(net))
        seen: list[Tensor] = []
        for step in range(2 * len(edits) + 2):
            edit = edits[step // 2] if step % 2 and step // 2 < len(edits) else None
            if edit and moment == "before forward":
                edit(net, optimizer)
            loss = loss_of(model(inputs(step, 4, WIDTH)))
            if edit and moment == "before backward":
                edit(net, optimizer)
            loss.backward()
            if edit and moment == "before step":
                edit(net, optimizer)
            if clips:
                seen.append(clip_grad_norm_(model.parameters(), 0.05))
            optimizer.step()
            if edit and moment == "before clearing":
                edit(net, optimizer)
            optimizer.zero_grad()
            seen += [p.grad.clone() for p in net.parameters() if type(p.grad) is Tensor]
        return [*values(net), *seen]

    run.__name__ = f"{' and '.join(edit.__name__ for edit in edits)}, {moment}"
    return run


def follow_edits(moment: str) -> None:
    for edit in EDITS:
        follow(train([edit], moment), with_ddp())


@pytest.mark.parametrize("moment", ["before forward", "before backward", "before step", "before clearing"])
def test_edits_follow_ddp(run_on_ranks: RunOnRanks, moment: str) -> None:
    run_on_ranks(2, follow_edits, moment)


def follow_several_edits() -> None:
    """A parameter that comes back goes on with its state."""
    for edits in ([remove, put_back], [put_in, swap, put_back]):
        follow(train(edits, "before step"), with_ddp())


@pytest.mark.parametrize("world_size", [2, 3])
def test_parameters_that_come_back(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, follow_several_edits)


def clip_with_edits() -> list[list[list[Tensor]]]:
    runs = [train(edits, "before step", clips=True) for edits in ([remove, put_back], [move])]
    return [[run(p) for p in (with_ddp(), *(with_zeroopt(stage=stage) for stage in STAGES))] for run in runs]


def test_norms_of_all_parameters(run_on_ranks: RunOnRanks) -> None:
    for runs in run_on_ranks(2, clip_with_edits):
        for expected, *stages in runs:
            for got in stages:
                for want, have in zip(expected, got, strict=True):
                    torch.testing.assert_close(have, want, rtol=2e-5, atol=1e-6)


def norms_of_the_optimizer() -> list[float]:
    """Those parameters that are in its groups count."""
    net = layers(4)
    model, optimizer = zeroopt.wrap(net, grouped(net))
    loss_of(model(inputs(0, 4, WIDTH))).backward()
    whole = [optimizer.full_grad(param) for param in net[0].parameters()]
    del optimizer.param_groups[1:]
    return [optimizer.clip_grad_norm_(1e9).item(), torch.stack([grad.norm() for grad in whole]).norm().item()]


def test_the_optimizers_own_norm(run_on_ranks: RunOnRanks) -> None:
    for got, expected in run_on_ranks(2, norms_of_the_optimizer):
        assert got == pytest.approx(expected, rel=1e-6)


def new_parameters(prepare: Prepare) -> list[Tensor]:
    """Parameters are replaced by larger ones in the model, and in their group."""
    net = layers()
    model, optimizer = prepare(net, grouped(net))
    for step in range(3):
        if step == 1:
            net[2].weight = nn.Parameter(torch.cat([net[2].weight.detach(), net[2].weight.detach()[:1] * 0.5]))
            net[2].bias = nn.Parameter(torch.cat([net[2].bias.detach(), net[2].bias.detach()[:1]]))
            optimizer.param_groups[2]["params"] = [net[2].weight, net[2].bias]
        loss_of(model(inputs(step, 4, WIDTH))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(net)


def by_hand(net: nn.Module, optimizer: torch.optim.Optimizer) -> Prepared:
    """DDP does not hear of new parameters."""

    def average(*_: object) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad /= dist.get_world_size()
                    dist.all_reduce(param.grad)

    optimizer.register_step_pre_hook(average)
    return net, optimizer


def follow_new_parameters() -> None:
    follow(new_parameters, by_hand)


def test_replaced_parameters(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, follow_new_parameters)


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    loss_of(model(inputs(step, 4, WIDTH))).backward()
    optimizer.step()
    model.zero_grad()


def out_and_back(options: dict[str, Any], *, edits: bool) -> list[Tensor]:
    """Out of the group, and back, between two steps."""
    net = layers()
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters(), lr=0.01), **options)
    for step in range(4):
        step_once(model, optimizer, step)
        if step == 1 and edits:
            params = optimizer.param_groups[0]["params"]
            optimizer.param_groups[0]["params"] = params[:2]
            optimizer.state_dict()
            assert net[1].weight.untyped_storage().nbytes() == net[1].weight.nbytes
            optimizer.param_groups[0]["params"] = params
    return [*values(net), *(optimizer.full_parameter(param) for param in net.parameters())]


TIERS: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 2, "bucket_mb": 0.001},
    {"stage": 2, "share_parameters": True},
    {"stage": 1, "transport": "pairwise", "fused": False},
    {"stage": 2, "param_dtype": torch.bfloat16, "cast_inputs": True},
    {"stage": 2, "param_dtype": torch.bfloat16, "cast_inputs": True, "master_weights": "remainder"},
    {"stage": 1, "state_dtype": torch.int8},
]


def out_and_back_in_all_tiers() -> list[tuple[list[Tensor], list[Tensor]]]:
    return [(out_and_back(tier, edits=False), out_and_back(tier, edits=True)) for tier in TIERS]


def test_nothing_is_lost_on_the_way(run_on_ranks: RunOnRanks) -> None:
    for tiers in run_on_ranks(2, out_and_back_in_all_tiers):
        for tier, (expected, got) in zip(TIERS, tiers, strict=True):
            assert all(map(torch.equal, expected, got)), tier


def state_after(edit: Edit, prepare: Prepare) -> dict[str, Any]:
    net = layers(4)
    model, optimizer = prepare(net, grouped(net))
    step_once(model, optimizer, 0)
    edit(net, optimizer)
    if not isinstance(optimizer, zeroopt.ZeroOptimizer):
        present = {param for group in optimizer.param_groups for param in group["params"]}
        for param in [param for param in optimizer.state if param not in present]:
            del optimizer.state[param]  # or torch could not save it
        return optimizer.state_dict()
    shard = optimizer.state_dict()
    optimizer.consolidate_state_dict()
    whole = optimizer.full_state_dict() if dist.get_rank() == 0 else {}
    assert not whole or shard["param_groups"] == whole["param_groups"]
    return whole


def states_after_edits(stage: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(state_after(e, with_ddp()), state_after(e, with_zeroopt(stage=stage, fused=False))) for e in EDITS]


@pytest.mark.parametrize("stage", [0, 2])
def test_state_dicts_are_torchs(run_on_ranks: RunOnRanks, stage: int) -> None:
    for expected, got in run_on_ranks(2, states_after_edits, stage)[0]:
        assert got["param_groups"] == expected["param_groups"]
        assert list(got["state"]) == sorted(expected["state"])
        for position, entry in expected["state"].items():
            assert got["state"][position].keys() == entry.keys()
            assert all(torch.equal(got["state"][position][name], value) for name, value in entry.items())


def resume(how: str, edit: Edit, path: Path) -> bool:
    """Saved after an edit, and loaded where the groups were so from the beginning."""
    net = layers(4)
    model, optimizer = zeroopt.wrap(net, grouped(net), bucket_mb=0.001)
    step_once(model, optimizer, 0)
    edit(net, optimizer)
    if how == "checkpoint":
        zeroopt.checkpoint.save(path, model, optimizer)
    shards: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shards, optimizer.state_dict())
    twin = layers(4)
    twin.load_state_dict(net.state_dict())
    names = {param: name for name, param in net.named_parameters()}
    twins = dict(twin.named_parameters())
    groups = [{**g, "params": [twins[names[p]] for p in g["params"]]} for g in optimizer.param_groups]
    other_model, other = zeroopt.wrap(twin, torch.optim.AdamW(groups), bucket_mb=0.001)
    if how == "checkpoint":
        zeroopt.checkpoint.load(path, other_model, other)
    else:
        other.load_state_dict(shards)
        optimizer.load_state_dict(optimizer.state_dict())
    for step in (1, 2):
        step_once(model, optimizer, step)
        step_once(other_model, other, step)
    return all(map(torch.equal, values(net), values(twin)))


def resume_all(how: str, path: Path) -> list[bool]:
    return [resume(how, edit, path / edit.__name__) for edit in (remove, move, put_in)]


@pytest.mark.parametrize("how", ["shards", "checkpoint"])
def test_resuming(run_on_ranks: RunOnRanks, how: str, tmp_path: Path) -> None:
    assert run_on_ranks(2, resume_all, how, tmp_path) == [[True] * 3] * 2


def two_optimizers(stage: int | None) -> list[Tensor]:
    """One of them gives parameters away; the other one takes them, and some that are new."""
    net = layers(4)
    optimizers = [
        torch.optim.AdamW([*net[0].parameters(), *net[1].parameters()], lr=0.01),
        torch.optim.AdamW(net[2].parameters(), lr=0.02),
    ]
    model: nn.Module = net
    for number in range(2 if stage is not None else 0):
        model, optimizers[number] = zeroopt.wrap(model, optimizers[number], stage=stage, bucket_mb=0.001)
    one, other = optimizers
    for step in range(4):
        loss_of(model(inputs(step, 4, WIDTH))).backward()
        if step == 1:
            one.param_groups[0]["params"] = list(net[0].parameters())
        if step == 2:
            other.param_groups[0]["params"] += [*net[1].parameters(), *net[3].parameters()]
        for param in net.parameters() if stage is None else ():
            param.grad /= dist.get_world_size()
            dist.all_reduce(param.grad)
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad()
        for optimizer in optimizers if stage is not None else ():
            optimizer.zero_grad()
    return values(net)


def two_optimizers_all() -> list[list[Tensor]]:
    return [two_optimizers(stage) for stage in (None, *STAGES)]


def test_several_optimizers(run_on_ranks: RunOnRanks) -> None:
    for expected, *stages in run_on_ranks(2, two_optimizers_all):
        for got in stages:
            for want, have in zip(expected, got, strict=True):
                torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-7)


class Whitened(torch.optim.Optimizer):
    """Needs whole parameters where its group says so."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "whole": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    scale = param.grad.norm() if group["whole"] else 1.0
                    param.sub_(param.grad / scale, alpha=group["lr"])


def spoil(case: str, net: Net, optimizer: torch.optim.Optimizer) -> None:
    first = optimizer.param_groups[0]
    if case == "foreign":
        first["params"].append(nn.Parameter(torch.ones(3)))
    elif case == "twice":
        optimizer.param_groups[1]["params"].append(net[0].weight)
    elif case == "nothing":
        del optimizer.param_groups[:]
    elif case == "options":
        optimizer.param_groups.append({"params": [net[3].weight]})
    elif case == "a string":
        first["params"] = ["weight"]
    elif case == "an iterator":
        first["params"] = iter(first["params"])
    elif case == "no group":
        optimizer.param_groups.append(list(net[3].parameters()))
    else:
        optimizer.param_groups[1] = {**optimizer.param_groups[1], "whole": True}
        optimizer.param_groups[1]["params"] = optimizer.param_groups[1]["params"][:1]


REFUSED = {
    "foreign": "ConfigError: parameter 2 of the optimizer (group 0, shape [3]) is not a parameter of the model",
    "twice": "ConfigError: parameter '0.weight' is in the optimizer twice",
    "nothing": "ConfigError: the optimizer has no parameters",
    "options": "ConfigError: param_group 3 lacks the options lr",
    "a string": "ConfigError: expected a parameter at place 0 of param_group 0, got str",
    "an iterator": "ConfigError: expected param_group 0 to be a dict with a list of parameters",
    "no group": "ConfigError: expected param_group 3 to be a dict with a list of parameters",
    "whole": "NotSupportedError: parameter '1.weight' was moved to param_group 1, whose options need whole parameters",
}


def refuse(case: str) -> tuple[str, bool]:
    """What each call says, and whether training goes on as if nothing had been once the groups are repaired."""
    net, twin = layers(4), layers(4)
    make = Whitened if case in ("whole", "options") else SignMomentum
    runs = []
    for each in (net, twin):
        optimizer = make([{"params": list(each[i].parameters())} for i in range(3)])
        runs.append(zeroopt.wrap(each, optimizer, bucket_mb=0.001))
        step_once(*runs[-1], 0)
    model, optimizer = runs[0]
    loss_of(model(inputs(1, 4, WIDTH))).backward()
    groups = [(group, list(group["params"])) for group in optimizer.param_groups]
    spoil(case, net, optimizer)
    messages = set()
    for call in (optimizer.step, optimizer.state_dict, lambda: model(inputs(2, 4, WIDTH))):
        try:
            call()
            messages.add("no error")
        except zeroopt.ZeroOptError as error:
            messages.add(f"{type(error).__name__}: {error}")
    optimizer.param_groups[:] = [group for group, _ in groups]
    for group, params in groups:
        group["params"] = params
    optimizer.step()
    optimizer.zero_grad()
    step_once(*runs[1], 1)
    (message,) = messages
    return message, all(map(torch.equal, values(net), values(twin)))


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(run_on_ranks: RunOnRanks, case: str) -> None:
    for message, undisturbed in run_on_ranks(2, refuse, case):
        assert message.startswith(REFUSED[case]), message
        assert undisturbed


def edit_differently() -> tuple[str, bool]:
    net = layers(4)
    model, optimizer = zeroopt.wrap(net, grouped(net))
    step_once(model, optimizer, 0)
    before = values(net)
    loss_of(model(inputs(1, 4, WIDTH))).backward()
    optimizer.param_groups.pop(dist.get_rank())
    with pytest.raises(zeroopt.RankMismatchError) as caught:
        optimizer.step()
    return str(caught.value), all(map(torch.equal, before, values(net)))


def test_ranks_that_edit_differently(run_on_ranks: RunOnRanks) -> None:
    (message, same), other = run_on_ranks(2, edit_differently)
    assert (message, same) == other and same
    assert "rank 0 has [parameter '1.weight' in param_group 0]" in message


def edit_alone(transport: str) -> str:
    net = layers(4)
    model, optimizer = zeroopt.wrap(net, grouped(net), transport=transport, process_group=dist.new_group())
    step_once(model, optimizer, 0)
    loss_of(model(inputs(1, 4, WIDTH))).backward()
    if dist.get_rank() == 0:
        optimizer.param_groups.pop(0)
    lose_patience(1.0)
    with pytest.raises(zeroopt.CollectiveError) as caught:
        optimizer.step()
        step_once(model, optimizer, 2)
    return str(caught.value)


@pytest.mark.parametrize("transport", ["shm", "pairwise"])
def test_a_rank_that_edits_alone_does_not_hang(run_on_ranks: RunOnRanks, transport: str) -> None:
    for message in run_on_ranks(2, edit_alone, transport):
        assert f"transport {transport}" in message


def edit_the_wrapped_optimizer() -> bool:
    """The groups of both are the same list, whoever's is replaced."""
    net = layers(4)
    inner = grouped(net)
    model, optimizer = zeroopt.wrap(net, inner)
    before = values(net)
    inner.param_groups = inner.param_groups[:1]
    step_once(model, optimizer, 0)
    stayed = [torch.equal(a, b) for a, b in zip(before, values(net), strict=True)]
    return stayed == [False] * 2 + [True] * 6 and optimizer.param_groups is inner.param_groups


def test_the_groups_are_the_wrapped_optimizers(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, edit_the_wrapped_optimizer) == [True, True]
