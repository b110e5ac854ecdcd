"""State of a shard group that every such group has: the sums, steps, norms and checkpoints of one flat group, bit for bit."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import whole_optimizers
from torch import Tensor
from training import batch, build, loss_of, optimizer_for, snapshot, train
from transports import CPU, sum_of_slices, values
from worker_pool import RankError, RunOnRanks

import zeroopt
from zeroopt.collectives.replicated import connect_replicated

NODES = ((0, 1), (2, 3))
APART = ((0, 2), (1, 3))


def group_of(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """The one that this rank is in."""
    made = [dist.new_group(list(ranks)) for ranks in groups]
    return next(one for one, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)


def exchange(
    groups: Sequence[Sequence[int]], numel: int, within: str
) -> tuple[int, int, Tensor, Tensor, Tensor, Tensor]:
    """Replica and slice of this rank; a sum with a base; one in place, finished before it; what is gathered; numbers."""
    transport = connect_replicated(within, dist.group.WORLD, group_of(groups), CPU)
    full = [transport.allocate(numel * transport.num_slices, torch.float32, CPU) for _ in range(3)]
    for number, bucket in enumerate(full):
        bucket.copy_(values(dist.get_rank(), bucket.numel(), bucket.dtype, number))
    out, base = torch.empty(numel), torch.arange(float(numel))
    own = transport.own_slice(full[1])
    pending = [transport.start_reduce_scatter(full[0], out, base), transport.start_reduce_scatter(full[1], own)]
    for one in reversed(pending):
        one.finish()
        one.wait_until_read()
        one.finish()
    transport.own_slice(full[2]).fill_(transport.slice_index)
    transport.start_rendezvous("gather").finish()
    gather = transport.start_all_gather(full[2])
    transport.flush()
    gather.finish()
    numbers = transport.gather_scalar(torch.tensor(float(dist.get_rank())))
    return transport.replica, transport.slice_index, out, own.clone(), full[2].clone(), numbers


@pytest.mark.parametrize(
    ("groups", "within"), [(NODES, "auto"), (NODES, "pairwise"), (NODES, "hierarchy"), (APART, "auto")]
)
@pytest.mark.parametrize("numel", [7, 64])
def test_sums_go_across_and_gathers_do_not(
    run_on_ranks: RunOnRanks, groups: Sequence[Sequence[int]], within: str, numel: int
) -> None:
    order = [rank for ranks in groups for rank in ranks]  # a group is a branch of the tree
    for rank, (replica, index, added, plain, gathered, numbers) in enumerate(
        run_on_ranks(4, exchange, groups, numel, within)
    ):
        assert groups[replica][index] == rank
        for number, got in enumerate((added, plain)):
            slices = [values(r, 2 * numel, torch.float32, number).view(2, -1)[index] for r in order]
            base = torch.arange(float(numel)) if got is added else None
            expected = sum_of_slices([torch.cat([one] * 4) for one in slices], 0, torch.float32, base)
            assert torch.equal(got, expected)
        assert torch.equal(gathered, torch.arange(2.0).repeat_interleave(numel))
        assert numbers.tolist() == order


OPTIONS: list[dict[str, Any]] = [
    {"stage": 1},
    {"stage": 2},
    {"stage": 2, "fused": False, "transport": "pairwise"},
    {"stage": 2, "step_in_backward": True},
    {"stage": 2, "overlap": False, "check_every": 1},
]


def train_sharded(groups: Sequence[Sequence[int]] | None, options: dict[str, Any]) -> list[list[Tensor]]:
    extra = {} if groups is None else {"shard_group": group_of(groups)}
    return train("mlp", "adamw", {**options, **extra, "bucket_mb": 0.005}, steps=3)


def train_all() -> list[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    """Flat, and with shard groups."""
    return [(train_sharded(None, one), train_sharded(NODES, one)) for one in OPTIONS]


def test_training_is_that_of_one_flat_group(run_on_ranks: RunOnRanks) -> None:
    for variants in run_on_ranks(4, train_all):
        for options, (flat, sharded) in zip(OPTIONS, variants, strict=True):
            for expected, got in zip(flat, sharded, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), options


def step_matrices(groups: Sequence[Sequence[int]] | None, optimizer_name: str) -> tuple[list[Tensor], int]:
    """Parameters after three steps, and how many times this rank has stepped a parameter."""
    with whole_optimizers.no_padding():
        net = whole_optimizers.build()
        inner = whole_optimizers.OPTIMIZERS[optimizer_name](net)
        extra = {} if groups is None else {"shard_group": group_of(groups)}
        model, optimizer = zeroopt.wrap(net, inner, stage=2, bucket_mb=0.003, **extra)
        for step in range(3):
            whole_optimizers.loss_for(model, step, dist.get_rank()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return snapshot(net), len(inner.stepped)


@pytest.mark.parametrize("optimizer_name", ["mixed", "lars"])
def test_each_group_steps_each_matrix_once(run_on_ranks: RunOnRanks, optimizer_name: str) -> None:
    flat, sharded = (run_on_ranks(4, step_matrices, groups, optimizer_name) for groups in (None, NODES))
    for (expected, _), (got, _) in zip(flat, sharded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    stepped = sum(number for _, number in flat)
    assert stepped > 0
    assert [sum(sharded[rank][1] for rank in ranks) for ranks in NODES] == [stepped] * 2


def clip_and_consolidate(
    groups: Sequence[Sequence[int]] | None,
) -> tuple[float, float, list[Tensor], dict[str, Any] | None]:
    """The norm that clips, the norm of torch's own function, parameters, and rank 3's whole state; accumulates."""
    net = build("mlp")
    extra = {} if groups is None else {"shard_group": group_of(groups)}
    model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), stage=2, bucket_mb=0.005, **extra)
    norms = []
    for step in range(3):
        for micro in range(2):
            loss_of(model(batch("mlp", 2 * step + micro))).backward()
        norms.append(
            (optimizer.clip_grad_norm_(0.5) if step else torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)).item()
        )
        optimizer.step()
        optimizer.zero_grad()
    optimizer.consolidate_state_dict(to=3)
    return norms[0], norms[2], snapshot(net), optimizer.full_state_dict() if dist.get_rank() == 3 else None


def test_norms_clipping_and_the_whole_state(run_on_ranks: RunOnRanks) -> None:
    flat, sharded = (run_on_ranks(4, clip_and_consolidate, groups) for groups in (None, NODES))
    for rank, (expected, got) in enumerate(zip(flat, sharded, strict=True)):
        for a, b in zip(expected[:2], got[:2], strict=True):
            assert b == pytest.approx(a, rel=1e-6) and b > 0
        for a, b in zip(expected[2], got[2], strict=True):
            torch.testing.assert_close(b, a)
        assert (got[3] is None) == (rank != 3)
    whole, other = sharded[3][3], flat[3][3]
    assert whole is not None and other is not None
    assert whole["state"].keys() == other["state"].keys()
    for position, entry in whole["state"].items():
        for name, value in entry.items():
            torch.testing.assert_close(value, other["state"][position][name])


def save_and_load(
    path: Path, saved_with: Sequence[Sequence[int]] | None, loaded_with: Sequence[Sequence[int]] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters after two more steps, without and with a checkpoint in between."""
    ends = []
    for groups in (saved_with, loaded_with):
        net = build("mlp")
        extra = {} if groups is None else {"shard_group": group_of(groups)}
        model, optimizer = zeroopt.wrap(net, optimizer_for("adamw", net), stage=2, bucket_mb=0.005, **extra)
        if groups is saved_with and not ends:
            loss_of(model(batch("mlp", 0))).backward()
            optimizer.step()
            optimizer.zero_grad()
            zeroopt.checkpoint.save(path, model, optimizer)
        else:
            zeroopt.checkpoint.load(path, model, optimizer)
        for step in (1, 2):
            loss_of(model(batch("mlp", step))).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(snapshot(net))
    return ends[0], ends[1]


@pytest.mark.parametrize(("saved_with", "loaded_with"), [(NODES, None), (None, NODES), (NODES, APART)])
def test_checkpoints(
    run_on_ranks: RunOnRanks,
    tmp_path: Path,
    saved_with: Sequence[Sequence[int]] | None,
    loaded_with: Sequence[Sequence[int]] | None,
) -> None:
    for went_on, loaded in run_on_ranks(4, save_and_load, tmp_path / "saved", saved_with, loaded_with):
        for a, b in zip(went_on, loaded, strict=True):
            torch.testing.assert_close(b, a)


def bytes_held_and_sent() -> tuple[int, int, int]:
    """Elements that this rank steps, elements of all buckets, and bytes that a gather sends beyond its own slice to one rank."""
    net = build("mlp")
    model, optimizer = zeroopt.wrap(
        net, optimizer_for("adamw", net), stage=2, shard_group=group_of(NODES), transport="pairwise", bucket_mb=1
    )
    loss_of(model(batch("mlp", 0))).backward()
    optimizer.step()
    replica = model.replica
    own, all_of_it = (
        sum(numels) for numels in zip(*((b.own_param.numel(), b.padded_numel) for b in replica.buckets), strict=True)
    )
    before = replica.transport.sent_bytes
    replica.transport.start_all_gather(replica.buckets[0].flat_param).finish()
    return (
        own,
        all_of_it,
        replica.transport.sent_bytes - before - replica.buckets[0].flat_param.nbytes // 2,
    )


def test_state_is_cut_within_a_group_alone(run_on_ranks: RunOnRanks) -> None:
    answers = run_on_ranks(4, bytes_held_and_sent)
    for first, second in NODES:
        assert answers[first][0] + answers[second][0] == answers[0][1]
    assert all(sent == 0 for _, _, sent in answers)


def wrap_with(groups: Sequence[Sequence[int]] | None, outsider: bool = False, **options: Any) -> str:
    """The error. With an outsider, all but rank 3 train together."""
    net = build("mlp")
    shard_group = None if groups is None else group_of(groups)
    if outsider:
        options["process_group"] = group_of(((0, 1, 2), (3,)))
    before = snapshot(net)
    try:
        zeroopt.wrap(net, optimizer_for("adamw", net), shard_group=shard_group, **options)
    except (zeroopt.ConfigError, zeroopt.RankMismatchError, zeroopt.NotSupportedError) as error:
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(net), strict=True))
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        (((0, 1, 2), (3, 2)), {}, "shard_group is a group of"),
        (((0, 1), (1, 2), (3, 2)), {}, "expected every rank of process_group to be in one shard_group"),
        (NODES, {"outsider": True}, "expected shard_group to be part of process_group"),
        (NODES, {"share_parameters": True}, "share_parameters=True is not supported with shard_group"),
        (NODES, {"gradient_compression": "int8"}, "gradient_compression is not supported with shard_group"),
        (NODES, {"parameter_compression": "int8"}, "parameter_compression is not supported with shard_group"),
        (NODES, {"average_every": 2}, "average_every is not supported with shard_group"),
        (((0,), (1,), (2,), (3,)), {}, "shard_group has one rank"),
    ],
)
def test_what_is_refused(
    run_on_ranks: RunOnRanks, groups: Sequence[Sequence[int]], options: dict[str, Any], message: str
) -> None:
    answers = run_on_ranks.outcomes(4, wrap_with, groups, **options)
    assert not any(isinstance(answer, RankError) for answer in answers), answers
    assert message in answers[0], answers


def lose_a_rank(within: str) -> str:
    """Rank 3 is killed, when all have connected. Rank 0 has nothing to do with it, rank 2 is in its shard group, rank 1 across from it."""
    transport = connect_replicated(within, dist.group.WORLD, group_of(NODES), CPU)
    full = transport.allocate(8, torch.float32, CPU)
    dist.barrier()
    if dist.get_rank() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(zeroopt.CollectiveError) as raised:
        for _ in range(2):  # the first one may come through without rank 3
            transport.start_reduce_scatter(full, torch.empty(4), label="bucket 1").finish()
            transport.start_all_gather(full, label="bucket 1").finish()
    return str(raised.value)


@pytest.mark.parametrize("within", ["shm", "pairwise"])
def test_a_rank_lost_in_another_shard_group_is_named(run_on_ranks: RunOnRanks, within: str) -> None:
    """By its number in the process group, by all others."""
    answers = run_on_ranks.outcomes(4, lose_a_rank, within)
    for rank, answer in enumerate(answers[:3]):
        assert isinstance(answer, str), answer
        assert "of bucket 1" in answer
        assert {int(one) for one in re.findall(r"\brank (\d)", answer)} - {rank} == {3}, answers


def whole_tensors() -> list[float]:
    """A whole gradient, an exact parameter, and what unwrapping leaves, beside those of one flat group."""
    found = []
    for groups in (None, NODES):
        net = build("mlp")
        extra = {} if groups is None else {"shard_group": group_of(groups)}
        model, optimizer = zeroopt.wrap(
            net,
            optimizer_for("adamw", net),
            stage=2,
            bucket_mb=0.005,
            param_dtype=torch.bfloat16,
            cast_inputs=True,
            **extra,
        )
        for step in range(2):
            loss_of(model(batch("mlp", step)).float()).backward()
            grads = [optimizer.full_grad(param) for param in net.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        exact = [optimizer.full_parameter(param) for param in net.parameters()]
        zeroopt.unwrap(model, optimizer)
        found.append([*grads, *exact, *(param.detach().clone() for param in net.parameters())])
    flat, sharded = found
    return [
        float((one.float() - other.float()).norm() / one.float().norm())
        for one, other in zip(flat, sharded, strict=True)
    ]


def test_whole_tensors_have_each_piece_once(run_on_ranks: RunOnRanks) -> None:
    for differences in run_on_ranks(4, whole_tensors):
        assert differences
        assert max(differences) < 0.1  # 16-bit sums are rounded once more on their way across
