"""Ranks and groups that train alone and average their parameters do what torch's PeriodicModelAverager does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from short_timeouts import lose_patience
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel
from training import Halves, batch, build, loss_of, optimizer_for, snapshot
from worker_pool import RankError, RunOnRanks

import zeroopt
from zeroopt.options.precision import round_master

STAGES = (0, 1, 2)
SMALL = {"bucket_mb": 0.002}
PAIRS = ((0, 1), (2, 3))
ACROSS = ((0, 2), (1, 3))


def group_of(parts: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """The one of these groups that this rank is in. Collective over all ranks."""
    groups = [dist.new_group(ranks) for ranks in parts]
    return next(group for ranks, group in zip(parts, groups, strict=True) if dist.get_rank() in ranks)


def grid() -> dict[str, Any]:
    """Four ranks in two groups of two."""
    return {"process_group": group_of(PAIRS), "average_group": group_of(ACROSS)}


def groups_for(world_size: int) -> dict[str, Any]:
    return grid() if world_size == 4 else {}


class InPlaceAverager:
    """As torch's, which gives parameters new storage, and with it another memory format, on which DDP goes astray."""

    def __init__(self, every: int, group: dist.ProcessGroup | None) -> None:
        self.every = every
        self.group = group
        self.steps = 0

    @torch.no_grad()
    def average_parameters(self, params: Iterable[Tensor]) -> None:
        self.steps += 1
        for param in params if self.steps % self.every == 0 else ():
            mean = param.contiguous().clone()
            dist.all_reduce(mean, group=self.group)
            param.copy_(mean / dist.get_world_size(self.group))


def run_steps(
    model: nn.Module, optimizer: Any, name: str, steps: Iterable[int], averager: Any = None
) -> list[list[Tensor]]:
    history = []
    for step in steps:
        loss_of(model(batch(name, step))).backward()
        optimizer.step()
        if averager is not None:
            averager.average_parameters(model.parameters())
        optimizer.zero_grad()
        history.append(snapshot(model))
    return history


def train_by_torch(name: str, optimizer_name: str, every: int, steps: int) -> list[list[Tensor]]:
    """Plain on two or three ranks, by DDP within groups on four."""
    groups = groups_for(dist.get_world_size())
    net = build(name)
    optimizer = optimizer_for(optimizer_name, net, groups=2)
    model = DistributedDataParallel(net, process_group=groups["process_group"]) if groups else net
    group = groups.get("average_group")
    averager: Any = InPlaceAverager(every, group)
    if name != "conv":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a period of 1 is not what torch recommends
            averager = PeriodicModelAverager(every, warmup_steps=every - 1, process_group=group)
    return run_steps(model, optimizer, name, range(steps), averager)


def train(
    name: str, optimizer_name: str, steps: int, options: dict[str, Any], groups: dict[str, Any] | None = None
) -> list[list[Tensor]]:
    groups = groups_for(dist.get_world_size()) if groups is None else groups
    net = build(name)
    model, optimizer = zeroopt.wrap(net, optimizer_for(optimizer_name, net, groups=2), **SMALL, **groups, **options)
    return [list(map(torch.clone, values)) for values in run_steps(model, optimizer, name, range(steps))]


def compare_all(name: str, optimizer_name: str, every: int, steps: int, variants: Sequence[dict[str, Any]]) -> None:
    """In float64: every step of every variant, on this rank, against torch's."""
    torch.set_default_dtype(torch.float64)
    try:
        expected = train_by_torch(name, optimizer_name, every, steps)
        for options in variants:
            history = train(name, optimizer_name, steps, {"average_every": every, **options})
            for step, (want, got) in enumerate(zip(expected, history, strict=True)):
                for a, b in zip(want, got, strict=True):
                    assert torch.allclose(b, a, rtol=1e-11, atol=1e-13), f"step {step} with {options}"
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_follows_torch(run_on_ranks: RunOnRanks, world_size: int, every: int) -> None:
    """Each model with each number of ranks, and with each number of steps."""
    name, optimizer = (("mlp", "adamw"), ("lm", "sgd_momentum"), ("conv", "sgd"))[(world_size + every) % 3]
    variants = [{"stage": stage} for stage in STAGES]
    variants += [{"stage": 2, "transport": "pairwise", "overlap": False}]
    run_on_ranks(world_size, compare_all, name, optimizer, every, 7, variants)


def train_beside_ddp() -> tuple[list[Tensor], list[Tensor]]:
    torch.set_default_dtype(torch.float64)
    try:
        net = build("mlp")
        expected = run_steps(DistributedDataParallel(net), optimizer_for("sgd", net, groups=2), "mlp", range(4))
        history = train("mlp", "sgd", 4, {"average_every": 1})
        return expected[-1], history[-1]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_averaging_every_step_of_plain_sgd_is_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    for expected, values in run_on_ranks(world_size, train_beside_ddp):
        for want, got in zip(expected, values, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


TIERS: list[dict[str, Any]] = [
    {},
    {"param_dtype": torch.bfloat16},
    {"param_dtype": torch.float16},
    {"param_dtype": torch.bfloat16, "master_weights": "remainder"},
    {"param_dtype": torch.bfloat16, "master_weights": "none"},
]


def average_different_weights(options: dict[str, Any], cast: torch.dtype) -> tuple[Tensor, Tensor, dict[int, Any]]:
    """The parameter that this rank brings, that all get by an average in a step that changes nothing, and the state."""
    torch.manual_seed(dist.get_rank())
    weight = nn.Parameter(torch.randn(1000).to(cast))
    net = nn.ParameterList([weight])
    before = weight.detach().clone()
    groups = groups_for(dist.get_world_size())
    _, optimizer = zeroopt.wrap(
        net, torch.optim.SGD(net.parameters(), lr=0.0), sync_module_states=False, average_every=1, **groups, **options
    )
    weight.sum().backward()
    optimizer.step()
    return before, weight.detach().clone(), optimizer.state_dict()["state"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_mean_is_exact_in_every_tier(run_on_ranks: RunOnRanks, world_size: int) -> None:
    casts = [(options, torch.float32) for options in TIERS]
    casts += [({"stage": stage}, dtype) for stage in STAGES for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    for options, cast in casts:
        ranks = run_on_ranks(world_size, average_different_weights, options, cast)
        brought = [before for before, _, _ in ranks]
        stored = options.get("param_dtype", cast)
        if options.get("master_weights") == "none":  # rounded once when wrapped, to the nearest
            brought = [values.to(stored) for values in brought]
        wide = torch.stack(brought).to(torch.float64 if cast is torch.float64 else torch.float32)
        mean = wide[0].clone()
        for values in wide[1:]:
            mean += values
        mean /= world_size
        exact = "param_dtype" in options and options.get("master_weights") != "none"
        rounded = round_master(mean, stored) if exact else mean.to(stored)
        for _, after, state in ranks:
            assert after.dtype is stored
            # Gloo adds three numbers in an order of its own.
            torch.testing.assert_close(
                after, rounded, rtol=0 if world_size == 2 else None, atol=0 if world_size == 2 else None
            )
            assert torch.equal(after, ranks[0][1])
            if "param_dtype" in options and options.get("master_weights") is None and world_size == 2:
                assert torch.equal(state[0]["master_param"], mean)


def train_tiers(variants: Sequence[dict[str, Any]], steps: int) -> list[list[list[Tensor]]]:
    return [train("lm", "adamw", steps, {"average_every": 2, **options}) for options in variants]


@pytest.mark.parametrize("world_size", [2, 4])
def test_sixteen_bit_tiers(run_on_ranks: RunOnRanks, world_size: int) -> None:
    """A remainder trains as a float32 master does, bit for bit, and all ranks have the same after an average."""
    tiers: list[dict[str, Any]] = [
        {"param_dtype": torch.bfloat16, "master_weights": tier, "stage": stage}
        for stage in (1, 2)
        for tier in ("float32", "remainder", "none")
    ]
    ranks = run_on_ranks(world_size, train_tiers, tiers, 4)
    for first_of_stage in (0, 3):
        for rank in ranks:
            for full, remainder in zip(rank[first_of_stage], rank[first_of_stage + 1], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(full, remainder, strict=True))
    for variant in range(len(tiers)):
        for step, alike in ((0, False), (1, True), (2, False), (3, True)):
            one, other = (rank[variant][step] for rank in (ranks[0], ranks[-1]))
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) == alike


def train_shared() -> bool:
    plain, shared = (
        train("lm", "adamw", 5, {"average_every": 2, "stage": stage, "share_parameters": share})
        for stage, share in ((1, False), (2, True))
    )
    return all(torch.equal(a, b) for x, y in zip(plain, shared, strict=True) for a, b in zip(x, y, strict=True))


def test_shared_parameters_change_no_bit(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(4, train_shared) == [True] * 4


def train_halves(wrapped: bool) -> list[Tensor]:
    """The first half of the ranks uses one half of the parameters, the rest the other one; a third one nobody."""
    torch.manual_seed(0)
    net: Any = Halves()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    model: Any = net
    groups = groups_for(world_size)
    if wrapped:
        model, optimizer = zeroopt.wrap(net, optimizer, average_every=2, fused=False, bucket_mb=0.001, **groups)
    x = torch.full((4, 7), (1.0 + rank) * (1 if rank < world_size / 2 else -1))
    for step in range(5):
        for inputs in [x] if wrapped or not groups else [x, x.sign() * (1.0 + (rank ^ 1))]:
            divisor = 1 if wrapped or not groups else 2
            (loss_of(model(inputs)) / divisor).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not wrapped and step % 2 == 1:
            for param in net.parameters():
                dist.all_reduce(param.data, group=groups.get("average_group"))
                param.data /= 2
    return snapshot(net)


@pytest.mark.parametrize("world_size", [2, 4])
def test_parameters_that_only_some_ranks_use(run_on_ranks: RunOnRanks, world_size: int) -> None:
    expected = run_on_ranks(world_size, train_halves, False)
    for want, got in zip(expected, run_on_ranks(world_size, train_halves, True), strict=True):
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def wrap_different_models(sync: bool) -> list[Tensor]:
    torch.manual_seed(dist.get_rank())
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    net[1].running_mean.normal_()
    zeroopt.wrap(
        net, optimizer_for("sgd", net), average_every=2, sync_module_states=sync, **groups_for(dist.get_world_size())
    )
    return snapshot(net)


@pytest.mark.parametrize("world_size", [3, 4])
def test_all_start_from_the_first_rank(run_on_ranks: RunOnRanks, world_size: int) -> None:
    ranks = run_on_ranks(world_size, wrap_different_models, True)
    alone = run_on_ranks(world_size, wrap_different_models, False)
    for values in ranks:
        assert all(torch.equal(a, b) for a, b in zip(alone[0], values, strict=True))
    assert not torch.equal(alone[0][0], alone[2][0])


def seed_of_rounding() -> int:
    net = build("mlp")
    _, optimizer = zeroopt.wrap(net, optimizer_for("sgd", net), average_every=2, **groups_for(dist.get_world_size()))
    return optimizer._trained.stepper.seed


def test_groups_round_independently(run_on_ranks: RunOnRanks) -> None:
    a, b, c, d = run_on_ranks(4, seed_of_rounding)
    assert a == b != c == d
    assert len(set(run_on_ranks(3, seed_of_rounding))) == 3


def resume(world_size: int) -> bool:
    """Training that is saved between two averages and goes on elsewhere."""
    groups = groups_for(world_size)

    def wrapped() -> tuple[nn.Module, Any, Any]:
        net = build("mlp")
        return net, *zeroopt.wrap(net, optimizer_for("adamw", net), average_every=3, **groups)

    net, model, optimizer = wrapped()
    run_steps(model, optimizer, "mlp", range(4))
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    expected = run_steps(model, optimizer, "mlp", range(4, 9))
    net, model, optimizer = wrapped()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    history = run_steps(model, optimizer, "mlp", range(4, 9))
    return all(torch.equal(a, b) for x, y in zip(expected, history, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_training_goes_on_from_a_saved_state(run_on_ranks: RunOnRanks, world_size: int) -> None:
    assert run_on_ranks(world_size, resume, world_size) == [True] * world_size


def load_other_orders(same: bool) -> None:
    """State of synchronous training, whose buckets have been planned anew, in groups that average."""
    net = build("mlp")
    groups = grid()
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), process_group=groups["process_group"], **SMALL)
    run_steps(model, optimizer, "mlp", range(2))
    states = [optimizer.state_dict() if same or dist.get_rank() < 2 else None]
    other = build("mlp")
    model, optimizer = zeroopt.wrap(other, optimizer_for("adamw", other), average_every=1, **groups, **SMALL)
    if states[0] is not None:
        assert states[0]["zeroopt"]["order"] != optimizer._trained.generations
        optimizer.load_state_dict(states[0])
    run_steps(model, optimizer, "mlp", range(2))


def test_buckets_must_be_alike(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(4, load_other_orders, True)
    error = only(run_on_ranks.outcomes(4, load_other_orders, False))
    assert error.type_name == "CollectiveError" and "buckets in different orders" in error.message


def try_to_wrap(what: str) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    net = build("mlp")
    options: dict[str, Any] = {"average_every": 2, **groups_for(world_size)}
    if what == "every":
        options["average_every"] = 2 if rank < 3 else 3
    elif what == "bad rank":
        options["stage"] = 2 if rank < 3 else 7
    elif what == "bad group":
        options["stage"] = 2 if rank < 2 else 1
    elif what == "same group":
        options["average_group"] = options["process_group"]
    elif what == "no member":
        options["average_group"] = dist.new_group([0])
    elif what == "crossed":
        options["average_group"] = group_of(((0, 3), (1, 2)))
    elif what == "sizes":
        options["process_group"], options["average_group"] = group_of(((0, 1, 2), (3,))), group_of(((0, 3), (1,), (2,)))
    elif what == "shared":
        options["share_parameters"] = True
    elif what == "no every":
        del options["average_every"]
    elif what.startswith("k="):
        options["average_every"] = eval(what[2:])
    model, _ = zeroopt.wrap(net, optimizer_for("adamw", net), **options)
    if what == "join":
        with model.join():
            pass


def only(outcomes: Sequence[RankError | None]) -> RankError:
    """The one error that all ranks raised."""
    assert len(set(outcomes)) == 1 and outcomes[0] is not None, outcomes
    return outcomes[0]


@pytest.mark.parametrize("what", ["k=0", "k=-1", "k=True", "k=2.0", "k='2'"])
def test_bad_periods(run_on_ranks: RunOnRanks, what: str) -> None:
    error = only(run_on_ranks.outcomes(2, try_to_wrap, what))
    message = f"expected average_every to be a positive number of steps or None, got {eval(what[2:])!r}"
    assert error == RankError("ConfigError", message)


def test_options_that_do_not_fit(run_on_ranks: RunOnRanks) -> None:
    assert only(run_on_ranks.outcomes(2, try_to_wrap, "shared")).message.startswith(
        "share_parameters=True with average"
    )
    assert only(run_on_ranks.outcomes(2, try_to_wrap, "join")).type_name == "NotSupportedError"
    assert only(run_on_ranks.outcomes(4, try_to_wrap, "join")).type_name == "NotSupportedError"
    assert only(run_on_ranks.outcomes(4, try_to_wrap, "no every")).message.startswith(
        "average_group needs average_every"
    )


def test_all_ranks_hear_of_a_mismatch(run_on_ranks: RunOnRanks) -> None:
    """Also those that have no group in common with the rank that is to blame."""
    for what, where in (("every", {2, 3}), ("bad rank", {2})):
        for rank, error in enumerate(run_on_ranks.outcomes(4, try_to_wrap, what)):
            assert isinstance(error, RankError)
            if what == "bad rank" and rank == 3:
                assert error.type_name == "ConfigError"
                continue
            assert error.type_name == "RankMismatchError"
            assert error.message.startswith("across average_group: ") == (rank not in where)
            assert ("average_every" if what == "every" else "expected stage to be one of") in error.message
    error = only(run_on_ranks.outcomes(4, try_to_wrap, "bad group"))
    assert error.type_name == "RankMismatchError" and "rank 0 has [option stage=2], rank 1 has [option" in error.message


def test_groups_that_do_not_fit(run_on_ranks: RunOnRanks) -> None:
    for rank, error in enumerate(run_on_ranks.outcomes(4, try_to_wrap, "same group")):
        assert isinstance(error, RankError) and error.type_name == "ConfigError"
        assert f"this rank, {rank}, has both groups in common with ranks [{rank ^ 1}]" in error.message
    errors = run_on_ranks.outcomes(4, try_to_wrap, "no member")
    assert all(isinstance(error, RankError) for error in errors)
    assert "that this rank is in, got" in str(errors[1])
    for error in run_on_ranks.outcomes(4, try_to_wrap, "crossed"):
        assert isinstance(error, RankError) and error.type_name == "RankMismatchError"
        assert error.message.startswith("across average_group: ") and "in process_group]" in error.message
    assert all(isinstance(error, RankError) for error in run_on_ranks.outcomes(4, try_to_wrap, "sizes"))


def average_without_a_rank() -> None:
    net = build("mlp")
    group = dist.new_group()
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), process_group=group, average_every=2)
    run_steps(model, optimizer, "mlp", range(1))
    lose_patience(1.0)
    if dist.get_rank() != 1:
        run_steps(model, optimizer, "mlp", range(1, 2))


def test_a_rank_that_does_not_come_is_missed(run_on_ranks: RunOnRanks) -> None:
    one, missing, other = run_on_ranks.outcomes(3, average_without_a_rank)
    assert missing is None
    for error in (one, other):
        assert isinstance(error, RankError) and error.type_name == "CollectiveError" and "averaging" in error.message
