"""State of any run loads into any other: other world sizes, stages, buckets and precisions; what does not fit is refused whole."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from state_cases import MAKERS, TIERS, Run, WideMoments, all_shards, assert_alike, whole_state
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.options.precision import round_master
from zeroopt.state.shard_tensor import ShardTensor

NAMES = ["adamw_amsgrad", "sgd_momentum", "sgd", "rmsprop_centered", "nested", "lars", "lamb", "adafactor"]
NAMES = [name for name in NAMES if name in MAKERS]
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {"stage": 2}),
    (2, {"stage": 1, "bucket_mb": 0.001}),
    (3, {"stage": 2, "bucket_mb": 0.002}),
    (2, {"stage": 0}),
]


def through_file(value: Any) -> Any:
    """Written by `torch.save` and read without running code."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def write_all(path: str, options: dict[str, Any], number: int) -> dict[str, Any]:
    """Shards of several optimizers, and their whole states."""
    wholes = {}
    for name in NAMES:
        run = Run(name, options)
        run.train(3, same=True)
        torch.save(run.optimizer.state_dict(), f"{path}/{number}-{name}-{dist.get_rank()}.pt")
        wholes[name] = whole_state(run.optimizer)
    return wholes


def read_all(path: str, target: int, steps: int) -> dict[str, dict[str, Any]]:
    """The whole state of each optimizer after loading that of another run."""
    wholes = {}
    for name in NAMES:
        run = Run(name, LAYOUTS[target][1])
        run.train(steps)  # planned anew, or not
        source = source_for(name, target)
        files = (f"{path}/{source}-{name}-{rank}.pt" for rank in reversed(range(LAYOUTS[source][0])))
        run.optimizer.load_state_dict(torch.load(file, weights_only=True) for file in files)
        wholes[name] = whole_state(run.optimizer)
    return wholes


def source_for(name: str, target: int) -> int:
    """Each optimizer is written and read by every layout, and each layout reads every other by two optimizers, or more."""
    return (target + NAMES.index(name)) % len(LAYOUTS)


def test_shards_load_at_any_world_size_stage_and_bucket_size(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    written = [
        run_on_ranks(size, write_all, str(tmp_path), options, number)[0]
        for number, (size, options) in enumerate(LAYOUTS)
    ]
    for target, (size, _) in enumerate(LAYOUTS):
        expected = {name: written[source_for(name, target)][name] for name in NAMES}
        for loaded in run_on_ranks(size, read_all, str(tmp_path), target, target % 2):
            assert_alike(expected, loaded)


def write_and_resume(name: str, options: dict[str, Any]) -> None:
    """In the same layout: the very same training, from a file for each rank."""
    run = Run(name, options)
    run.train(3)
    model, own = through_file(run.model.state_dict()), through_file(run.optimizer.state_dict())
    run.train(1)
    resumed = Run(name, options)
    for group in resumed.optimizer.param_groups:
        group["lr"] = 123.0
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(own)
    resumed.step = 3
    again = through_file(resumed.optimizer.state_dict())
    assert_alike(own["state"], again["state"], f"{name}, {options}")
    assert_alike(own["param_groups"], again["param_groups"])
    resumed.train(1)
    assert_alike(run.params(), resumed.params(), f"{name}, {options}")


def resume_all(cases: list[tuple[str, dict[str, Any]]]) -> None:
    for case in cases:
        write_and_resume(*case)


def test_a_rank_resumes_from_its_own_shard_bit_for_bit(run_on_ranks: RunOnRanks) -> None:
    cases = [("adamw_amsgrad", {"stage": stage, **tier}) for tier in TIERS.values() for stage in (0, 2)]
    cases += [(name, {"stage": 2, "bucket_mb": 0.001}) for name in NAMES]
    cases += [("lamb", {"stage": 1, **TIERS[tier]}) for tier in ("int8 with remainder", "bfloat16 without master")]
    cases += [("sgd_momentum", {"stage": 2, **TIERS[tier]}) for tier in ("int8", "bfloat16 without master")]
    run_on_ranks(3, resume_all, cases)


def exact_params(run: Run) -> dict[str, Tensor]:
    """Parameters as precisely as they are kept."""
    named = run.net.named_parameters()
    return {n: run.optimizer.full_parameter(p).float() for n, p in named if p.requires_grad}


def write_tiers(path: str, name: str) -> dict[str, Any]:
    """For each tier: exact parameters and the whole state."""
    result = {}
    for tier, options in TIERS.items():
        run = Run(name, {"bucket_mb": 0.002, **options})
        run.train(3)
        torch.save(run.optimizer.state_dict(), f"{path}/{tier}-{dist.get_rank()}.pt")
        whole = whole_state(run.optimizer)
        result[tier] = exact_params(run), whole
        if dist.get_rank() == 0:
            torch.save(run.model.state_dict(), f"{path}/{tier}-model.pt")
            torch.save(whole, f"{path}/{tier}-whole.pt")
    return result


def read_tier(
    path: str, name: str, source: str, target: str, files: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    run = Run(name, {"stage": 1, **TIERS[target]})
    run.train(1)
    run.model.load_state_dict(torch.load(f"{path}/{source}-model.pt", weights_only=True))
    given = [torch.load(f"{path}/{source}-{file}.pt", weights_only=True) for file in files]
    run.optimizer.load_state_dict(given if len(given) > 1 else given[0])
    if len(given) > 1:  # parameters are there for all ranks
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, run.params())
        assert all(torch.equal(a, b) for other in gathered for a, b in zip(gathered[0], other, strict=True))
    return exact_params(run), whole_state(run.optimizer)


def check_pair(source: str, target: str, saved: Any, loaded: Any) -> None:
    where = f"{source} to {target}"
    params, whole = saved
    from_16_bits, to_16_bits = "param_dtype" in TIERS[source], "param_dtype" in TIERS[target]
    for key, value in loaded[0].items():
        keeps = TIERS[target].get("master_weights") != "none"
        expected = params[key]
        knows = from_16_bits and TIERS[source].get("master_weights") != "none"
        if not keeps or (to_16_bits and not knows):  # the model's own state dict is all that there is
            rounded = round_master(expected, torch.bfloat16) if from_16_bits else expected.bfloat16()
            assert torch.equal(round_master(value, torch.bfloat16), rounded), f"{where}: {key}"
        else:
            assert torch.equal(value, expected), f"{where}: {key}"
    before, after = TIERS[source].get("state_dtype"), TIERS[target].get("state_dtype")
    for position, entry in whole["state"].items():
        got = loaded[1]["state"][position]
        for key, value in entry.items():
            exact = value.float()  # what is wider than here is rounded at the latest when it is first stepped with
            rounded = exact.bfloat16().float() if after is torch.bfloat16 and key != "step" else exact
            assert any(torch.equal(got[key].float(), one) for one in (exact, rounded)), f"{where}: {position}.{key}"
    if before is after is torch.int8:
        scales = {p: {k: v for k, v in e.items() if k.endswith("_scale")} for p, e in whole["zeroopt"]["state"].items()}
        for position, entry in scales.items():
            for key, value in entry.items():
                assert torch.equal(value, loaded[1]["zeroopt"]["state"][position][key])


def read_tiers(path: str, name: str, saved: dict[str, Any], world_size: int, distances: list[int]) -> None:
    shards = [str(rank) for rank in range(world_size)]
    tiers = list(TIERS)
    for place, source in enumerate(tiers):
        for distance in distances:
            number = (place + distance) % len(tiers)
            files = shards if number % 2 or distance == 0 else ["whole"]
            check_pair(source, tiers[number], saved[source], read_tier(path, name, source, tiers[number], files))


@pytest.mark.parametrize(
    ("name", "size", "distances"),
    [
        ("adamw_amsgrad", 2, list(range(len(TIERS)))),
        ("lamb", 1, [0, 1, 4]),  # stepped whole; how values become those of another tier is the same for both
    ],
)
def test_every_precision_loads_into_every_other(
    run_on_ranks: RunOnRanks, tmp_path: Path, name: str, size: int, distances: list[int]
) -> None:
    saved = run_on_ranks(3, write_tiers, str(tmp_path), name)[0]
    run_on_ranks(size, read_tiers, str(tmp_path), name, saved, 3, distances)


def one_at_a_time() -> None:
    """An iterator's dicts are let go before the next one is made."""
    run = Run("adamw", {"stage": 2, "bucket_mb": 0.001})
    run.train(2)
    shards, alive = all_shards(run.optimizer), []

    class Shard(dict):  # type: ignore[type-arg]  a plain dict has no weak references
        pass

    def read() -> Iterator[Any]:
        for shard in shards:
            assert not [one for one in alive if one() is not None], "the one before is still in memory"
            made = Shard(shard)
            alive.append(weakref.ref(made))
            yield made
            del made

    expected = whole_state(run.optimizer)
    run.train(1)
    run.optimizer.load_state_dict(read())
    assert len(alive) == dist.get_world_size()
    assert_alike(expected, whole_state(run.optimizer))


def collective_free() -> None:
    """One rank alone saves, before and after the first step; and what it saves is about as large as its share."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=0.05)
    for _ in range(3):
        for rank in range(dist.get_world_size()):
            if dist.get_rank() == rank:
                own = optimizer.state_dict()
                assert type(own) is type(own["state"]) is type(own["zeroopt"]) is dict
            dist.barrier()
        optimizer.load_state_dict(through_file(own))
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(torch.ones(2, 64)).sum().backward()  # gradients are no part of it
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    share = 2 * 4 * sum(p.numel() for p in net.parameters()) / dist.get_world_size()
    assert share * 0.9 < file.tell() < share * 1.15 + 16_000
    held = sum(
        v.local.numel() for e in optimizer.state_dict()["state"].values() for v in e.values() if type(v) is ShardTensor
    )
    assert held > 0 or dist.get_world_size() == 1


def hooks() -> None:
    run = Run("adamw", {"stage": 2})
    run.train(1)
    seen = []

    def add(_: Any, state_dict: Any) -> Any:
        seen.append("saved")
        return {**state_dict, "mine": 1}

    def change(_: Any, state_dict: Any) -> Any:
        seen.append("load")
        assert state_dict.pop("mine") == 1
        state_dict["param_groups"] = [{**group, "lr": 5.0} for group in state_dict["param_groups"]]
        return state_dict

    run.optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    run.optimizer.register_state_dict_post_hook(add)
    run.optimizer.register_load_state_dict_pre_hook(change)
    run.optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    own = run.optimizer.state_dict()
    run.optimizer.load_state_dict(own)
    assert own["mine"] == 1 and own["param_groups"][0]["lr"] != 5.0, "the user's dict was changed"
    assert [group["lr"] for group in run.optimizer.param_groups] == [5.0, 5.0]
    run.optimizer.load_state_dict(all_shards(run.optimizer))
    count = dist.get_world_size()
    assert seen == ["save", "saved", "load", "loaded", "save", "saved", *["load"] * count, "loaded"]


def masters_before_the_first_step() -> None:
    """What rounding took from the parameters when they were wrapped is saved although there is no state yet."""
    for tier in ("master", "remainder"):
        run = Run("adamw", {"stage": 2, **TIERS[tier]})
        saved = through_file([run.model.state_dict(), run.optimizer.state_dict()])
        shards, whole, exact = all_shards(run.optimizer), whole_state(run.optimizer), exact_params(run)
        assert saved[1]["state"] == whole["state"] == {}
        for given in (saved[1], shards, whole):
            for options in ({"stage": 2, **TIERS[tier]}, {"stage": 1}, {"stage": 0, **TIERS["remainder"]}):
                if given is saved[1] and options["stage"] != 2:
                    continue
                other = Run("adamw", options)
                other.model.load_state_dict(saved[0])
                other.optimizer.load_state_dict(given)
                assert other.optimizer.state == {}
                assert_alike(exact, exact_params(other), f"{tier} to {options}")


def float32_moments_of_bfloat16_parameters() -> None:
    """State keeps the dtype that its optimizer gave it, whatever torch's base class would make of it."""
    torch.manual_seed(0)
    nets = [nn.Linear(33, 17).bfloat16() for _ in range(2)]
    wrapped = [zeroopt.wrap(net, WideMoments(net.parameters()), stage=2) for net in nets]
    for model, optimizer in wrapped[:1]:
        for _ in range(2):
            model(torch.full((2, 33), 0.1).bfloat16()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    saved = wrapped[0][1]
    assert {v.dtype for e in saved.state.values() for v in e.values()} == {torch.float32}
    expected = whole_state(saved)
    for given in (saved.state_dict(), all_shards(saved)):
        for fresh in (True, False):
            if fresh:
                net = nn.Linear(33, 17).bfloat16()
                other = zeroopt.wrap(net, WideMoments(net.parameters()), stage=2)[1]
            other.load_state_dict(given)
            assert_alike(expected, whole_state(other))


def test_saving(run_on_ranks: RunOnRanks) -> None:
    for world_size in (1, 3):
        run_on_ranks(world_size, collective_free)
        run_on_ranks(world_size, one_at_a_time)
    run_on_ranks(2, hooks)
    run_on_ranks(2, masters_before_the_first_step)
    run_on_ranks(2, float32_moments_of_bfloat16_parameters)


def grow(optimizer: Any, net: nn.Sequential) -> None:
    optimizer.add_param_group({"params": list(net[1].parameters()), "lr": 0.5})


def grown(stage: int) -> tuple[zeroopt.ZeroDataParallel, Any, nn.Sequential]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 29), nn.Linear(29, 5))
    net[2].requires_grad_(False)
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters()}]
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(groups), stage=stage, bucket_mb=0.001)
    return model, optimizer, net


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(2, 33)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def generations() -> None:
    """Parameters that were taken in later, and those that were frozen when the state was saved."""
    for stage in (0, 2):
        model, optimizer, net = grown(stage)
        step(model, optimizer)
        frozen = whole_state(optimizer), all_shards(optimizer)
        grow(optimizer, net)
        net[2].requires_grad_(True)
        step(model, optimizer)
        whole, shards = whole_state(optimizer), all_shards(optimizer)
        assert list(whole["state"]) == [0, 1, 2, 3, 4, 5]
        for given in (whole, shards):
            model, other, net = grown(2 - stage)
            grow(other, net)
            net[2].requires_grad_(True)
            model(torch.ones(2, 33)).sum().backward()
            other.zero_grad()
            other.load_state_dict(given)
            assert_alike(whole, whole_state(other))
        for given in frozen:
            model, other, net = grown(2 - stage)
            net[2].requires_grad_(True)
            step(model, other)
            other.load_state_dict(given)
            assert_alike(frozen[0], whole_state(other))
            step(model, other)
            assert [e["step"].item() for e in whole_state(other)["state"].values()] == [2, 2, 1, 1]


def test_parameters_that_came_later(run_on_ranks: RunOnRanks) -> None:
    for world_size in (1, 3):
        run_on_ranks(world_size, generations)


def refusals() -> list[tuple[str, str]]:
    """Messages by case; nothing is changed by any."""
    run = Run("adamw", {"stage": 2, "bucket_mb": 0.001})
    run.train(2)
    shards, whole = all_shards(run.optimizer), whole_state(run.optimizer)
    small = Run("adamw", {"stage": 2, "bucket_mb": 10.0})
    small.train(2)
    other_layout = all_shards(small.optimizer)
    run.train(1)
    rank = dist.get_rank()

    def edited(path: list[Any], value: Any) -> Any:
        result = copy.deepcopy(shards)
        place = result[0]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return result

    wrong_shape = copy.deepcopy(whole)
    wrong_shape["state"][0]["exp_avg"] = torch.zeros(3, 2)
    fewer = copy.deepcopy(whole)
    fewer["param_groups"][0]["params"].pop()
    last = copy.deepcopy(whole)
    last["state"][max(last["state"])]["exp_avg"] = torch.zeros(77)
    cases: dict[str, Any] = {
        "missing": shards[:-1],
        "another's": shards[(rank + 1) % len(shards)],
        "other layout": [*shards[:-1], other_layout[-1]],
        "own of another layout": other_layout[rank],
        "format": edited(["zeroopt", "format"], 4),
        "shapes": edited(["zeroopt", "shapes", 3], [5]),
        "shape": wrong_shape,
        "late": last,
        "groups": fewer,
        "model": {"weight": torch.zeros(2)},
        "path": "optimizer.pt",
        "none": [],
        "list": [torch.zeros(2)],
    }
    before = through_file(run.optimizer.state_dict())
    messages = []
    for name, given in cases.items():
        with pytest.raises(zeroopt.StateError) as caught:
            run.optimizer.load_state_dict(given)
        messages.append((name, str(caught.value)))
        now = through_file(run.optimizer.state_dict())
        before["zeroopt"], now["zeroopt"] = None, None
        assert_alike(before, now, name)
    with run.model.join(), pytest.raises(zeroopt.StateError, match="join"):
        run.optimizer.load_state_dict(shards)
    run.optimizer.load_state_dict(shards)
    assert_alike(whole, whole_state(run.optimizer))
    return messages


EXPECTED = {
    "missing": ("they are not those of all ranks of one run; give load_state_dict what",),
    "another's": ("lacks elements", "holds nothing of parameter"),
    "other layout": ("they are not those of all ranks of one run; give load_state_dict what",),
    "own of another layout": ("lacks elements", "holds nothing of parameter"),
    "format": ("expected a state dict of format 5 or 6, got 4",),
    "shapes": ("the state dict has shape [5] for parameter",),
    "shape": ("the state dict has 'exp_avg' of shape [3, 2] for parameter",),
    "late": ("the state dict has 'exp_avg' of shape [77] for parameter",),
    "groups": ("expected param_groups of [3, 8] parameters, the state dict has [2, 8]",),
    "model": ("expected state dicts of an optimizer, with 'state' and 'param_groups'; got ['weight']",),
    "path": ("expected state dicts of an optimizer, with 'state' and 'param_groups'; got str",),
    "none": ("expected a state dict, or those of all ranks of a run; got none",),
    "list": ("expected state dicts of an optimizer, with 'state' and 'param_groups'; got Tensor",),
}


def test_what_does_not_fit_is_refused_whole(run_on_ranks: RunOnRanks) -> None:
    for messages in run_on_ranks(2, refusals):
        for name, message in messages:
            assert any(text in message for text in EXPECTED[name]), f"{name}: {message}"


def fails_alone() -> str:
    """Between tiers loading is collective, and one rank's shards cannot be read."""
    saved = Run("adamw", {"stage": 2, **TIERS["remainder"]})
    saved.train(2)
    shards = all_shards(saved.optimizer)
    run = Run("adamw", {"stage": 2})
    run.train(1)
    before = exact_params(run), whole_state(run.optimizer)

    def read() -> Iterator[Any]:
        yield shards[0]
        if dist.get_rank() == 1:
            raise OSError("disk gone")
        yield shards[1]

    with pytest.raises(zeroopt.ZeroOptError if dist.get_rank() != 1 else Exception) as caught:
        run.optimizer.load_state_dict(read())
    assert_alike(before, (exact_params(run), whole_state(run.optimizer)))
    run.train(1)
    return str(caught.value)


def rank_0_saves(tier: str) -> list[str]:
    """As Lightning, transformers and Accelerate do it: rank 0 writes `optimizer.state_dict()`, and all ranks load that file."""
    options = {"stage": 2, "bucket_mb": 0.002, **TIERS[tier]}
    run = Run("adamw", options)
    run.train(3)
    messages = []

    def file_of_rank_0() -> Any:
        held = [through_file(run.optimizer.state_dict()) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(held, 0)
        return held[0]

    other = Run("adamw", options)
    other.train(1)
    before = exact_params(other), all_shards(other.optimizer)
    with pytest.raises(zeroopt.ZeroOptError) as caught:
        other.optimizer.load_state_dict(file_of_rank_0())
    messages.append(str(caught.value))
    assert_alike(before, (exact_params(other), all_shards(other.optimizer)))

    run.optimizer.consolidate_state_dict()
    run.optimizer.param_groups[0]["lr"] = 0.03  # by a scheduler that is stepped after the optimizer
    saved = file_of_rank_0()
    assert saved["param_groups"][0]["lr"] == 0.03
    model = through_file(run.model.state_dict())
    for fresh in (True, False):
        resumed = Run("adamw", options) if fresh else other
        resumed.model.load_state_dict(model)
        resumed.optimizer.load_state_dict(saved)
        assert_alike(whole_state(run.optimizer)["state"], whole_state(resumed.optimizer)["state"])
        resumed.step = 3
        resumed.train(2)
        results = resumed.params()
        if fresh:
            first = results
        else:
            assert_alike(first, results)
    own = through_file(run.optimizer.state_dict())  # whole on rank 0, shards elsewhere
    again = Run("adamw", options)
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(own)
    again.step = run.step = 3
    run.train(2)
    again.train(2)
    assert_alike(run.params(), again.params())
    assert_alike(run.params(), first)
    assert "rank" in run.optimizer.state_dict()["zeroopt"], "the step has made it a shard again"
    return messages


def test_where_rank_0_saves_for_all(run_on_ranks: RunOnRanks) -> None:
    for tier in ("float32", "int8 with remainder"):
        for (message,) in run_on_ranks(2, rank_0_saves, tier):
            assert "lacks elements" in message or "holds nothing of parameter" in message
            assert (
                "call optimizer.consolidate_state_dict() on every rank before that rank calls state_dict()" in message
            )


def different_things() -> None:
    """What each rank could load by itself, and all of them together cannot."""
    run = Run("adamw", {"stage": 2, "bucket_mb": 0.002})
    run.train(2)
    own = through_file(run.optimizer.state_dict())
    before = all_shards(run.optimizer)
    if dist.get_rank() == 1:
        own["param_groups"][1]["lr"] = 7.0
    with pytest.raises(
        zeroopt.RankMismatchError, match=r"load_state_dict got different things .*param_group 1 with .*lr=7\.0"
    ):
        run.optimizer.load_state_dict(own)
    with pytest.raises(zeroopt.ZeroOptError, match="expected state dicts of an optimizer"):
        run.optimizer.load_state_dict(own if dist.get_rank() == 0 else {})
    assert_alike(before, all_shards(run.optimizer))
    run.train(1)


def test_all_ranks_load_or_none(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, different_things)


def masters_without_layout(tier: str) -> None:
    """From where nothing says how parameters were kept: into float32 ones, which are exact on all ranks then."""
    saved = Run("adamw", {"stage": 2, **TIERS[tier]}, unused=False)
    saved.train(3)
    own = copy.deepcopy(saved.optimizer.state_dict())
    other = Run("adamw", {"stage": 2}, unused=False)
    other.train(3)  # buckets are planned anew, as those
    other.model.load_state_dict(saved.model.state_dict())
    other.optimizer.load_state_dict({"state": own["state"], "param_groups": own["param_groups"]})
    assert_alike(exact_params(saved), exact_params(other))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, other.params())
    assert_alike(gathered[0], gathered[1])


def test_masters_reach_all_ranks(run_on_ranks: RunOnRanks) -> None:
    for tier in ("master", "remainder"):
        run_on_ranks(2, masters_without_layout, tier)


def codes_of_format_5() -> None:
    """Earlier versions had 8-bit codes where now are the moments that they stand for."""
    options = {"stage": 2, "bucket_mb": 0.002, **TIERS["int8"]}
    run = Run("adamw", options)
    run.train(2)
    own = run.optimizer.state_dict()
    live = dict(run.optimizer.state)
    params = [param for group in run.optimizer.param_groups for param in group["params"]]
    for position, entry in own["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in entry:
                codes = live[params[position]][name]
                assert codes.dtype in (torch.int8, torch.uint8) and entry[name].dtype is torch.float32
                whole = tuple(entry[name].shape) if type(entry[name]) is Tensor else codes.shape
                entry[name] = (
                    codes.clone().as_strided(whole, entry[name].stride()) if whole != codes.shape else codes.clone()
                )
    own["zeroopt"]["format"] = 5
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    for tier in ("int8", "float32"):
        results = []
        for given in (everyone, all_shards(run.optimizer)):
            other = Run("adamw", {**options, "state_dtype": TIERS[tier].get("state_dtype", torch.float32)})
            other.model.load_state_dict(run.model.state_dict())
            other.optimizer.load_state_dict(given)
            results.append(whole_state(other.optimizer))
        assert_alike(*results)


def test_the_format_before(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, codes_of_format_5)


def test_no_rank_waits_for_one_that_fails_alone(run_on_ranks: RunOnRanks) -> None:
    for message in run_on_ranks(2, fails_alone):
        assert "disk gone" in message
