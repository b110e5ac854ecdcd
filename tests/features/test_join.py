"""Ranks with different numbers of batches train as under DistributedDataParallel.join, the sharded optimizer included."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import Halves, Mlp, batch, build, loss_of, optimizer_for, prepare, snapshot
from transports import hosts
from worker_pool import RankError, RunOnRanks

import zeroopt
from zeroopt.features.join import pack_options, take_options

STAGES = (0, 1, 2)
# Small buckets: several travel, and buckets are planned anew after the first step.
SMALL = {"bucket_mb": 0.002}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def clip(model: nn.Module, optimizer: Any, max_norm: float) -> None:
    if isinstance(optimizer, zeroopt.ZeroOptimizer):
        optimizer.clip_grad_norm_(max_norm)
    else:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def train(
    options: dict[str, Any] | None,
    num_batches: Sequence[int],
    *,
    model_name: str = "mlp",
    optimizer_name: str = "adamw",
    dtype: torch.dtype = torch.float64,
    max_norm: float | None = 0.05,
    accumulate: int = 1,
    no_sync: bool = False,
    epochs: int = 1,
    **join: Any,
) -> list[Tensor]:
    """Train this rank's part of `num_batches`; a learning rate that changes with each step, on the ranks that step."""
    with default_dtype(dtype):
        net = build(model_name)
        model, optimizer = prepare(net, optimizer_for(optimizer_name, net, groups=2), options)
        for epoch in range(epochs):
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            with model.join(**join):
                for number in range(num_batches[dist.get_rank()]):
                    last = (number + 1) % accumulate == 0
                    with model.no_sync() if no_sync and not last else nullcontext():
                        loss_of(model(batch(model_name, 100 * epoch + number))).backward()
                    if last:
                        if max_norm is not None:
                            clip(model, optimizer, max_norm)
                        optimizer.step()
                        scheduler.step()
                        optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = group.pop("initial_lr")
        return snapshot(net)


def train_all(
    variants: Sequence[dict[str, Any] | None], num_batches: Sequence[int], **kwargs: Any
) -> list[list[Tensor]]:
    return [train(options, num_batches, **kwargs) for options in variants]


def variants(**options: Any) -> list[dict[str, Any] | None]:
    return [None, *({"stage": stage, **SMALL, **options} for stage in STAGES)]


def longest(num_batches: Sequence[int]) -> int:
    return max(range(len(num_batches)), key=lambda rank: num_batches[rank])


def check_parity(ranks: list[list[list[Tensor]]], num_batches: Sequence[int]) -> None:
    """All ranks have what the rank that trains longest has under DDP, whose variant is the first."""
    expected = ranks[longest(num_batches)][0]
    for values in (variant for rank in ranks for variant in rank[1:]):
        for want, got in zip(expected, values, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


# The rank that trains longest is the first, the last, in between; one has nothing to do; two leave at once.
UNEVEN = [(2, 5), (5, 2), (0, 3), (4, 1, 6), (3, 6, 0), (5, 2, 2), (1, 4, 4)]


@pytest.mark.parametrize("divide", [True, False], ids=["all", "active"])
@pytest.mark.parametrize("num_batches", UNEVEN, ids=str)
def test_follows_ddp(run_on_ranks: RunOnRanks, num_batches: Sequence[int], divide: bool) -> None:
    ranks = run_on_ranks(
        len(num_batches), train_all, variants(), num_batches, divide_by_initial_world_size=divide, epochs=1
    )
    check_parity(ranks, num_batches)


@pytest.mark.parametrize("divide", [True, False], ids=["all", "active"])
def test_follows_ddp_when_gradients_are_accumulated_locally(run_on_ranks: RunOnRanks, divide: bool) -> None:
    """Those that no step of their rank has taken up are dropped, as under DDP."""
    for num_batches in ((3, 8), (7, 2, 6)):
        ranks = run_on_ranks(
            len(num_batches),
            train_all,
            variants(),
            num_batches,
            accumulate=2,
            no_sync=True,
            divide_by_initial_world_size=divide,
        )
        check_parity(ranks, num_batches)


def train_alone(num_batches: Sequence[int], accumulate: int, divide_by_all: bool) -> list[Tensor]:
    """What `train` comes to where several backward passes go into a step, on one rank, from gradients of single batches."""
    with default_dtype(torch.float64):
        net = build("mlp")
        optimizer = optimizer_for("adamw", net, groups=2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for number in range(max(num_batches)):
            active = [rank for rank, count in enumerate(num_batches) if number < count]
            divisor = len(num_batches) if divide_by_all else len(active)
            for rank in active:
                generator = torch.Generator().manual_seed(1000 * number + rank)
                (loss_of(net(Mlp.inputs(generator))) / divisor).backward()
            if (number + 1) % accumulate == 0:
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        return snapshot(net)


@pytest.mark.parametrize("divide", [True, False], ids=["all", "active"])
def test_several_backward_passes_for_a_step(run_on_ranks: RunOnRanks, divide: bool) -> None:
    """A rank that leaves between two of them keeps what was summed before."""
    for num_batches in ((3, 6), (4, 1, 5)):
        expected = train_alone(num_batches, 2, divide)
        ranks = run_on_ranks(
            len(num_batches),
            train_all,
            variants()[1:],
            num_batches,
            accumulate=2,
            divide_by_initial_world_size=divide,
        )
        for values in (variant for rank in ranks for variant in rank):
            for want, got in zip(expected, values, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def train_over(
    transports: Sequence[tuple[str, dict[str, Any]]], num_batches: Sequence[int], model_name: str, **kwargs: Any
) -> list[list[Tensor]]:
    """In float32, by the fused kernels where there are. "hybrid" has the ranks on two hosts."""
    results = []
    for transport, options in transports:
        world_size = dist.get_world_size()
        where: AbstractContextManager[None] = nullcontext()
        if transport == "hybrid":
            where = hosts([2 * rank // world_size for rank in range(world_size)])
            transport = "auto"
        with where:
            all_options = {**SMALL, "transport": transport, **options}
            results.append(train(all_options, num_batches, model_name=model_name, dtype=torch.float32, **kwargs))
    return results


def check_same_bits(ranks: list[list[list[Tensor]]], num_params: int | None = None) -> None:
    for values in (variant for rank in ranks for variant in rank):
        for want, got in zip(ranks[0][0][:num_params], values[:num_params], strict=True):
            assert torch.equal(want, got)


@pytest.mark.parametrize("model_name", ["mlp", "lm", "conv"])
def test_stages_and_transports_do_not_change_a_bit(run_on_ranks: RunOnRanks, model_name: str) -> None:
    variants: list[tuple[str, dict[str, Any]]] = [
        *(("shm", {"stage": stage}) for stage in STAGES),
        *(("pairwise", {"stage": stage}) for stage in STAGES),
        ("shm", {"stage": 2, "share_parameters": True}),
        ("shm", {"stage": 1, "overlap": False}),
    ]
    for num_batches in ((3, 1), (2, 0, 4)):
        check_same_bits(run_on_ranks(len(num_batches), train_over, variants, num_batches, model_name, max_norm=None))


def test_hosts_do_not_change_a_bit(run_on_ranks: RunOnRanks) -> None:
    variants: list[tuple[str, dict[str, Any]]] = [
        ("hybrid", {"stage": 0}),
        ("pairwise", {}),
        *(("hybrid", {"stage": stage}) for stage in (1, 2)),
        ("hybrid", {"share_parameters": True}),
    ]
    for accumulate in (1, 2):  # stage 0 adds up in another order when there are two
        ranks = run_on_ranks(
            4, train_over, variants[accumulate - 1 :], (3, 1, 5, 1), "lm", max_norm=None, accumulate=accumulate
        )
        check_same_bits(ranks)


def test_torch_transport(run_on_ranks: RunOnRanks) -> None:
    options = [None, *({"stage": stage, "transport": "torch", **SMALL} for stage in STAGES)]
    check_parity(run_on_ranks(3, train_all, options, (1, 4, 2)), (1, 4, 2))


def test_sixteen_bits(run_on_ranks: RunOnRanks) -> None:
    """Of all tiers; masters and 8-bit moments are stepped on by ranks that have left."""
    half = {"param_dtype": torch.bfloat16}
    variants: list[tuple[str, dict[str, Any]]] = [
        ("auto", {**half, "master_weights": "remainder"}),
        ("pairwise", {**half, "master_weights": "remainder", "stage": 1}),
        ("auto", {**half, "master_weights": "remainder", "share_parameters": True}),
    ]
    check_same_bits(run_on_ranks(3, train_over, variants, (2, 0, 4), "lm", max_norm=None))
    stochastic: list[tuple[str, dict[str, Any]]] = [
        ("auto", {**half, "master_weights": "none", "state_dtype": torch.int8, "stage": stage}) for stage in (1, 2)
    ]
    check_same_bits(run_on_ranks(3, train_over, stochastic, (2, 0, 4), "lm", max_norm=None))


def train_evenly(stages: Sequence[int], max_norm: float | None) -> list[list[Tensor]]:
    return [
        train({"stage": stage, **SMALL}, (3, 3), enable=enable, max_norm=max_norm)
        for stage in stages
        for enable in (False, True)
    ]


def test_even_batches_change_nothing(run_on_ranks: RunOnRanks) -> None:
    """Stages add up the squares of a norm in orders of their own, so where it clips, its last bit may differ between them."""
    check_same_bits(run_on_ranks(2, train_evenly, STAGES, None))
    for stage in STAGES:
        check_same_bits(run_on_ranks(2, train_evenly, [stage], 0.05))


def test_one_context_after_another(run_on_ranks: RunOnRanks) -> None:
    """Without state: the optimizers of ranks that have left do not step under DDP, and lose it."""
    for num_batches in ((2, 4), (3, 1, 2)):
        ranks = run_on_ranks(len(num_batches), train_all, variants(), num_batches, optimizer_name="sgd", epochs=3)
        check_parity(ranks, num_batches)


def train_halves(stage: int, num_batches: Sequence[int]) -> list[Tensor]:
    """Rank 0 uses the one half, the others the other one."""
    torch.manual_seed(0)
    net = Halves()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    model, optimizer = zeroopt.wrap(net, optimizer, stage=stage, bucket_mb=0.001)
    sign = 1.0 if dist.get_rank() == 0 else -1.0
    start = snapshot(net)
    with model.join():
        for _ in range(num_batches[dist.get_rank()]):
            optimizer.zero_grad()
            loss_of(model(torch.full((4, 7), sign))).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(start[4:], snapshot(net)[4:], strict=True))
    return snapshot(net)


def test_parameters_that_only_some_ranks_use(run_on_ranks: RunOnRanks) -> None:
    """When the one rank that uses them has left, parameters stay as they are, moments and weight decay included."""
    after: dict[tuple[int, ...], list[Tensor]] = {}
    for num_batches in ((1, 1), (1, 4), (4, 1)):
        ranks = [run_on_ranks(2, train_halves, stage, num_batches) for stage in STAGES]
        check_same_bits(ranks)
        after[num_batches] = ranks[0][0]
    for whose, stopped in ((slice(0, 2), (1, 4)), (slice(2, 4), (4, 1))):
        for one, many in zip(after[1, 1][whose], after[stopped][whose], strict=True):
            assert torch.equal(one, many)


class Repeated(nn.Module):
    """A layer that ranks use in unequally many segments of reentrant checkpointing, or plainly."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, *, again: bool) -> Tensor:
        for part in (*[self.layer] * (1 + dist.get_rank() % 2), self.other):
            x = checkpoint(part, x, use_reentrant=True) if again else part(x)
        return x


def train_repeated(stage: int, num_batches: Sequence[int]) -> list[list[Tensor]]:
    histories = []
    for again in (False, True):
        torch.manual_seed(0)
        net = Repeated()
        model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1), stage=stage, bucket_mb=1e-4)
        with model.join():
            for number in range(num_batches[dist.get_rank()]):
                x = torch.full((1, 4), 1.0 + number + dist.get_rank(), requires_grad=True)
                loss_of(model(x, again=again)).backward()
                optimizer.step()
                optimizer.zero_grad()
        histories.append(snapshot(net))
    return histories


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_have_left_go_along_with_whatever_reentrant_segments_the_others_use(
    run_on_ranks: RunOnRanks, stage: int
) -> None:
    for plain, again in run_on_ranks(3, train_repeated, stage, (3, 2, 1)):
        for want, got in zip(plain, again, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def train_with_buffers(num_batches: Sequence[int], **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's buffers when it leaves, and in the end."""
    net = build("conv")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), **options)
    with model.join():
        for number in range(num_batches[dist.get_rank()]):
            loss_of(model(batch("conv", number))).backward()
            optimizer.step()
            optimizer.zero_grad()
        when_left = [buffer.clone() for buffer in net.buffers()]
    return when_left, [buffer.clone() for buffer in net.buffers()]


@pytest.mark.parametrize(("num_batches", "source"), [((2, 3), 1), ((3, 2), 0), ((1, 3, 3), 1), ((2, 2, 2), 0)])
def test_buffers_are_those_of_a_rank_that_trained_longest(
    run_on_ranks: RunOnRanks, num_batches: Sequence[int], source: int
) -> None:
    for stage in STAGES:
        ranks = run_on_ranks(len(num_batches), train_with_buffers, num_batches, stage=stage)
        for _, buffers in ranks:
            assert all(torch.equal(a, b) for a, b in zip(ranks[source][0], buffers, strict=True))
    for when_left, buffers in run_on_ranks(2, train_with_buffers, (2, 3), broadcast_buffers=False):
        assert all(torch.equal(a, b) for a, b in zip(when_left, buffers, strict=True))


def train_as_users_do(stage: int) -> tuple[int, list[float], list[Tensor]]:
    """Loops that clear gradients elsewhere, step with a closure, and watch steps by a hook."""
    net = build("lm")
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd_momentum", net), stage=stage, **SMALL)
    steps: list[None] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(None))

    def closure(number: int) -> Tensor:
        model.zero_grad(set_to_none=number % 2 == 0)
        loss = loss_of(model(batch("lm", number)))
        loss.backward()
        return loss

    with model.join():
        for number in range(4 - 2 * dist.get_rank()):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step(lambda number=number: closure(number))  # type: ignore[misc]
    return len(steps), [group["lr"] for group in optimizer.param_groups], snapshot(net)


def test_ranks_that_have_left_step_with_the_others(run_on_ranks: RunOnRanks) -> None:
    ranks = [values for stage in STAGES for values in run_on_ranks(2, train_as_users_do, stage)]
    for steps, rates, values in ranks:
        assert steps == 4
        assert rates == [0.1 * 0.9 * 0.9 * 0.9 * 0.9]
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][2], values, strict=True))


def edit_gradients() -> tuple[list[Tensor], list[Tensor]]:
    """Stage 0: parameters and momentum, when the loop clips by torch's own function."""
    net = build("lm")
    model, optimizer = zeroopt.wrap(net, optimizer_for("sgd_momentum", net), stage=0, **SMALL)
    with model.join():
        for number in range(1 + 3 * dist.get_rank()):
            loss_of(model(batch("lm", number))).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    return snapshot(net), [state[i]["momentum_buffer"].clone() for i in sorted(state)]


def test_gradients_that_are_edited_in_stage_0(run_on_ranks: RunOnRanks) -> None:
    one, other = run_on_ranks(2, edit_gradients)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def stop_early(stage: int, model_name: str, batches: int) -> tuple[list[str], list[Tensor]]:
    """What is raised when ranks leave, in two epochs, and the parameters after one more with even batches."""
    net = build(model_name)
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), stage=stage, **SMALL)
    errors = []
    for _ in range(2):
        try:
            with model.join(throw_on_early_termination=True):
                for number in range(batches + dist.get_rank() % 2):
                    with model.no_sync() if number == 2 else nullcontext():
                        loss_of(model(batch(model_name, number))).backward()
                    if number != 2:
                        optimizer.step()
                    optimizer.zero_grad()
        except zeroopt.StateError as error:
            errors.append(str(error))
        optimizer.zero_grad()
    with model.join(throw_on_early_termination=True):
        loss_of(model(batch(model_name, 9))).backward()
        optimizer.step()
    return errors, [value.clone() for value in net.parameters()]


@pytest.mark.parametrize("model_name", ["mlp", "conv"])
def test_throwing_on_early_termination(run_on_ranks: RunOnRanks, model_name: str) -> None:
    """All ranks raise the same, under `no_sync` too, and may go on afterwards."""
    for world_size, gone in ((2, "rank 0"), (3, "rank 0, rank 2")):
        for batches in (1, 2):
            ranks = run_on_ranks(world_size, stop_early, 2, model_name, batches)
            for errors, values in ranks:
                expected = f"{gone} ran out of data within join(throw_on_early_termination=True), so all ranks stop"
                assert errors == [expected] * 2
                assert all(torch.equal(a, b) for a, b in zip(ranks[0][1], values, strict=True))


def count_exchanges() -> list[int]:
    """Small gathers of a step without `join`, with one that is off, and with one that is on."""
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), overlap=False)
    counts = []
    gather = optimizer._transport.gather_scalar
    calls: list[None] = []

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return gather(*args, **kwargs)

    optimizer._transport.gather_scalar = counting  # type: ignore[method-assign]
    for context in (nullcontext, lambda: model.join(enable=False), model.join):
        calls.clear()
        with context():
            loss_of(model(batch("mlp", 0))).backward()
            optimizer.step()
            optimizer.zero_grad()
        counts.append(len(calls))
    return counts


def test_nothing_more_is_exchanged_outside(run_on_ranks: RunOnRanks) -> None:
    # On entering; backward, step and leaving.
    assert run_on_ranks(2, count_exchanges) == [[0, 1, 1 + 3]] * 2


def misuse(what: str) -> None:
    net, other = build("mlp"), build("mlp")
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net))
    second, _ = zeroopt.wrap(other, optimizer_for("adamw", other))
    rank = dist.get_rank()
    if what == "arguments":
        with model.join(divide_by_initial_world_size=rank == 0):
            pass
    elif what == "enable":
        with model.join(enable=rank == 0):
            pass
    calls: dict[str, Callable[[], Any]] = {
        "nested": lambda: model.join().__enter__(),
        "other model": lambda: second.join().__enter__(),
        "write": lambda: model.write_parameters().__enter__(),
        "load": lambda: model.load_state_dict(net.state_dict()),
        "load optimizer": lambda: optimizer.load_state_dict(optimizer.state_dict()),
    }
    if what == "caught":
        with model.join(throw_on_early_termination=True), suppress(zeroopt.StateError):
            for number in range(2 - rank):
                loss_of(model(batch("mlp", number))).backward()
                optimizer.step()
    with model.join():
        loss_of(model(batch("mlp", 0))).backward()
        if what == "diverge" and rank == 0:
            loss_of(model(batch("mlp", 1))).backward()
        if what == "raise" and rank == 0:
            raise KeyError("data")
        optimizer.step()
        if what in calls:
            calls[what]()


def only(outcomes: Sequence[RankError | None]) -> RankError:
    """The one error that all ranks raised."""
    assert len(set(outcomes)) == 1 and outcomes[0] is not None, outcomes
    return outcomes[0]


def test_refusals(run_on_ranks: RunOnRanks) -> None:
    error = only(run_on_ranks.outcomes(2, misuse, "arguments"))
    assert error.type_name == "RankMismatchError"
    assert "rank 0 has divide_by_initial_world_size=True, enable=True" in error.message
    assert "rank 1 has divide_by_initial_world_size=False, enable=True" in error.message
    assert only(run_on_ranks.outcomes(2, misuse, "enable")).type_name == "RankMismatchError"
    for what, message in (
        ("nested", "join() cannot be called within join()"),
        ("other model", "join() of another model is open"),
        ("write", "write_parameters() cannot be called within join()"),
        ("load", "load_state_dict() cannot be called within join()"),
        ("load optimizer", "load_state_dict() cannot be called within join()"),
    ):
        error = only(run_on_ranks.outcomes(2, misuse, what))
        assert error.type_name == "StateError" and error.message.startswith(message)
    assert run_on_ranks(2, misuse, "nothing") == [None, None]


def test_a_stop_that_is_caught_within_the_context_is_raised_at_its_end(run_on_ranks: RunOnRanks) -> None:
    assert only(run_on_ranks.outcomes(2, misuse, "caught")).message.startswith("rank 1 ran out of data")


def test_ranks_that_part_are_told(run_on_ranks: RunOnRanks) -> None:
    error = only(run_on_ranks.outcomes(2, misuse, "diverge"))
    assert error.type_name == "CollectiveError" and "rank 0 backward, rank 1 step" in error.message


def test_an_exception_in_the_context_does_not_make_others_wait(run_on_ranks: RunOnRanks) -> None:
    own, other = run_on_ranks.outcomes(2, misuse, "raise")
    assert own == RankError("KeyError", "'data'")
    assert isinstance(other, RankError) and other.type_name == "CollectiveError" and "rank 0" in other.message


def test_options_are_taken_over_into_the_tensors_that_are_there() -> None:
    lr, beta = torch.tensor(0.5), torch.tensor(0.9)
    theirs = [{"params": [], "lr": torch.tensor(0.25), "betas": (torch.tensor(0.8), 0.99), "eps": 1e-8, "flag": (1, 2)}]
    groups: list[dict[str, Any]] = [{"lr": lr, "betas": (beta, 0.9), "eps": 1e-6, "flag": None}]
    take_options(groups, pack_options(theirs))
    assert groups[0]["lr"] is lr and lr == torch.tensor(0.25)
    assert groups[0]["betas"] == (beta, 0.99) and groups[0]["betas"][0] is beta and beta == torch.tensor(0.8)
    assert groups[0]["eps"] == 1e-8 and groups[0]["flag"] == (1, 2)


class Betas(NamedTuple):
    first: Any
    second: Any


def test_options_in_other_containers_are_taken_over_likewise() -> None:
    first, weight = torch.tensor(0.9), torch.tensor(1.0)
    theirs = [{"betas": Betas(torch.tensor(0.8), 0.99), "more": OrderedDict(a=torch.tensor(2.0), b=[3])}]
    groups: list[dict[str, Any]] = [{"betas": Betas(first, 0.9), "more": OrderedDict(a=weight, b=[4])}]
    take_options(groups, pack_options(theirs))
    assert groups[0]["betas"] == Betas(first, 0.99) and groups[0]["betas"].first is first
    assert first == torch.tensor(0.8)
    assert groups[0]["more"] == OrderedDict(a=weight, b=[3]) and groups[0]["more"]["a"] is weight
    assert weight == torch.tensor(2.0)
    assert theirs[0]["more"]["b"] == [3] and theirs[0]["more"]["a"] is not weight, "the sender's own stay its own"
