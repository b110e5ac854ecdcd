"""full_state_dict() is what the plain torch optimizer would have under DDP, on one rank, and goes on from there."""

from __future__ import annotations

import copy
import ctypes
import gc
import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from measure import peak_rss_bytes, reset_peak_rss, rss_bytes, run_fresh
from state_cases import MAKERS, Run, all_shards, assert_alike, whole_state
from torch import Tensor, nn
from training import prepare_all
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.state.consolidate import gather_state

LAYOUTS: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1, "bucket_mb": 0.001},
    {"stage": 2, "bucket_mb": 0.002},
]


def compare_with_ddp(names: list[str], fused: bool) -> None:
    for name in names:
        plain = Run(name, None)
        plain.train(2)
        state = copy.deepcopy(plain.optimizer.state_dict())
        plain.train(2)
        for options in LAYOUTS:
            where = f"{name}, {options}, rank {dist.get_rank()}"
            run = Run(name, {**options, "fused": fused})
            run.train(2)
            whole = whole_state(run.optimizer, to=dist.get_world_size() - 1)
            assert_alike(state, whole, where, exact=not fused)
            carried = Run(name, None)
            carried.net.load_state_dict(run.model.state_dict())
            carried.optimizer.load_state_dict(whole)
            carried.step = run.step
            carried.train(2)
            assert_alike(plain.params(), carried.params(), where, exact=not fused)


NAMES = sorted(MAKERS)


@pytest.mark.parametrize("names", [NAMES[i::4] for i in range(4)], ids=", ".join)
def test_is_what_ddp_has_bit_for_bit(run_on_ranks: RunOnRanks, names: list[str]) -> None:
    run_on_ranks(2, compare_with_ddp, names, False)


def test_is_close_to_what_ddp_has_with_fused_kernels(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, compare_with_ddp, ["adamw_amsgrad", "sgd", "sgd_momentum", "adagrad"], True)


class WithEmpty(nn.Module):
    """A parameter without elements, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 33)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.frozen = nn.Parameter(torch.ones(33), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.frozen + self.empty.sum()


def idle_parameters(options: dict[str, Any]) -> None:
    """Adagrad makes state in its constructor, and counts on it for all parameters."""
    torch.manual_seed(0)
    net = WithEmpty()
    model, optimizer = zeroopt.wrap(
        net, torch.optim.Adagrad(net.parameters(), initial_accumulator_value=0.5), **options
    )
    assert list(optimizer.state_dict()["state"]) == [0, 1, 2, 3]
    for _ in range(2):
        model(torch.ones(2, 7)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = whole_state(optimizer)
    assert [list(entry["sum"].shape) for entry in whole["state"].values()] == [[0, 4], [33], [33, 7], [33]]
    assert torch.equal(whole["state"][1]["sum"], torch.full((33,), 0.5))

    plain = copy.deepcopy(net)
    plain.frozen.requires_grad_()
    carried = torch.optim.Adagrad(plain.parameters())
    carried.load_state_dict(copy.deepcopy(whole))
    plain(torch.ones(2, 7)).sum().backward()
    carried.step()
    assert carried.state[plain.layer.weight]["step"] == 3 and carried.state[plain.frozen]["step"] == 1

    net.frozen.data.fill_(2.0)
    for given in (whole, all_shards(optimizer)):
        other = WithEmpty()
        _, loaded = zeroopt.wrap(other, torch.optim.Adagrad(other.parameters()), **options)
        assert loaded.state[other.frozen]["sum"].eq(0).all()
        loaded.load_state_dict(given)
        assert loaded.state[other.frozen]["sum"].eq(0.5).all()
        assert_alike(whole, whole_state(loaded))


def test_state_of_parameters_that_nobody_steps(run_on_ranks: RunOnRanks) -> None:
    for options in ({"stage": 0}, {"stage": 2}, {"stage": 2, "fused": False}):
        run_on_ranks(2, idle_parameters, options)


def momentum_turned_on_later() -> None:
    """From then on there is state, and only of what is stepped."""
    plain, run = Run("sgd", None), Run("sgd", {"stage": 2, "bucket_mb": 0.001, "fused": False})
    for one in (plain, run):
        one.train(1)
        one.optimizer.param_groups[1]["momentum"] = 0.9
        one.train(1)
    assert_alike(plain.optimizer.state_dict(), whole_state(run.optimizer))


def before_the_first_step() -> None:
    for name in ("adamw", "adagrad", "nested", "lars"):
        plain = Run(name, None)
        for options in ({"stage": 2}, {"stage": 0}, {"stage": 2, "param_dtype": torch.bfloat16}):
            if name == "adagrad" and "param_dtype" in options:
                continue  # its frozen parameters have been cast, and their state was made in that dtype
            run = Run(name, options)
            whole = whole_state(run.optimizer)
            whole.pop("zeroopt", None)
            assert_alike(plain.optimizer.state_dict(), whole, f"{name}, {options}")


def named_parameters() -> None:
    """torch's groups may have names beside the parameters."""
    plain, sharded = (nn.Linear(33, 7) for _ in range(2))
    _, optimizer = zeroopt.wrap(sharded, torch.optim.AdamW(sharded.named_parameters()))
    assert_alike(torch.optim.AdamW(plain.named_parameters()).state_dict(), whole_state(optimizer))


def test_states_that_come_late_or_never(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, momentum_turned_on_later)
    run_on_ranks(2, before_the_first_step)
    if "param_names" in torch.optim.SGD(nn.Linear(1, 1).named_parameters()).param_groups[0]:
        run_on_ranks(2, named_parameters)


class TwoLayers(nn.Sequential):
    """A model with an optimizer for each of its layers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(33, 17), nn.Linear(17, 5))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        momentum = torch.optim.SGD(self[1].parameters(), lr=0.1, momentum=0.9)
        return [torch.optim.AdamW(self[0].parameters()), momentum]


def several_optimizers() -> None:
    results = []
    for options in (None, {"stage": 2, "fused": False}):
        net = TwoLayers()
        model, optimizers = prepare_all(net, net.optimizers(), options)
        for _ in range(2):
            model(torch.ones(4, 33)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        results.append([one.state_dict() if options is None else whole_state(one) for one in optimizers])
    assert_alike(*results)


def test_several_optimizers(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, several_optimizers)


def errors() -> None:
    run = Run("adamw", {"stage": 2, "bucket_mb": 0.001})
    optimizer, rank = run.optimizer, dist.get_rank()
    run.train(1)
    with pytest.raises(zeroopt.StateError, match=rf"rank {rank} has no whole state: .*\(to={rank}\) on all ranks"):
        optimizer.full_state_dict()
    for to in (-1, 3):
        with pytest.raises(zeroopt.ConfigError, match=f"expected a rank below 3, got to={to}"):
            optimizer.consolidate_state_dict(to=to)
    optimizer.consolidate_state_dict(to=1)
    if rank == 1:
        before = optimizer.full_state_dict()
        copied = copy.deepcopy(before)
        assert optimizer.full_state_dict() is before
    else:
        with pytest.raises(zeroopt.StateError, match=f"rank {rank} has no whole state"):
            optimizer.full_state_dict()
    run.train(1)
    with pytest.raises(zeroopt.StateError, match=f"rank {rank} has no whole state: .* after the last step"):
        optimizer.full_state_dict()
    if rank == 1:
        assert_alike(copied, before)
    optimizer.consolidate_state_dict(to=0)
    optimizer.load_state_dict(all_shards(optimizer))
    with pytest.raises(zeroopt.StateError, match="after the last step"):
        optimizer.full_state_dict()
    with run.model.join(), pytest.raises(zeroopt.StateError, match=r"consolidate_state_dict\(\)"):
        optimizer.consolidate_state_dict()


def test_wrong_ranks_and_moments(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(3, errors)


def consolidate_again() -> None:
    """The second time, and a third time in which gathering fails."""
    run, rank = Run("adamw", {"stage": 2, "bucket_mb": 0.001}), dist.get_rank()
    run.train(1)
    run.optimizer.consolidate_state_dict(to=1)
    former = [weakref.ref(run.optimizer.full_state_dict()["state"][0]["exp_avg"])] if rank == 1 else []
    alive = []

    def gather(*args: Any, **options: Any) -> Any:
        alive.append([tensor() for tensor in former])
        return gather_state(*args, **options)

    with patch("zeroopt.state.dicts.gather_state", gather):
        run.optimizer.consolidate_state_dict(to=1)
    assert alive == [[None] * len(former)]
    assert rank != 1 or run.optimizer.full_state_dict()["state"]
    with patch("zeroopt.state.dicts.gather_state", side_effect=MemoryError), pytest.raises(MemoryError):
        run.optimizer.consolidate_state_dict(to=1)
    with pytest.raises(zeroopt.StateError, match=f"rank {rank} has no whole state"):
        run.optimizer.full_state_dict()


def test_what_was_gathered_before_is_gone_when_it_is_gathered_again(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, consolidate_again)


M_MMAP_THRESHOLD = -3  # from malloc.h
WIDTH, LAYERS, BUCKET_MB = 1024, 20, 4.0
STATE_BYTES = 2 * 4 * WIDTH * WIDTH * LAYERS  # AdamW's moments, as the dict has them


def consolidation_bytes(options: dict[str, Any]) -> tuple[int, int]:
    """Peak of memory above what there was, and what stays."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17) == 1  # what is freed goes back
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=BUCKET_MB, **options)
    model(torch.ones(1, WIDTH)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.gather_object(None, [None] * 3 if dist.get_rank() == 1 else None, dst=1)  # starts the connections
    gc.collect()
    before = rss_bytes()
    reset_peak_rss()
    optimizer.consolidate_state_dict(to=1)
    dist.barrier()
    return peak_rss_bytes() - before, rss_bytes() - before


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.int8}], ids=str)
def test_one_rank_takes_memory_for_it_and_no_other(options: dict[str, Any]) -> None:
    for rank, (peak, left) in enumerate(run_fresh(3, consolidation_bytes, options)):
        print(f"rank {rank}: peak {peak / 2**20:.1f} MiB, {left / 2**20:.1f} MiB stay")
        whole = STATE_BYTES if rank == 1 else 0
        one_parameter = 2 * 4 * WIDTH * WIDTH
        assert whole <= peak <= whole + 2 * one_parameter + 4 * 2**20
