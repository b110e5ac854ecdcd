"""State that torch's ZeroRedundancyOptimizer has saved continues under zeroopt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_rank import CONTINUED, SAVED_AFTER, WORLD_SIZE, groups_of, inputs, loss_of, make_net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from worker_pool import RunOnRanks

import zeroopt
from zeroopt.checkpoint.foreign.convert_zero_redundancy import from_zero_redundancy
from zeroopt.errors import StateError

OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Losses of all ranks together."""
    losses = []
    for step in steps:
        loss = loss_of(model(inputs(step, dist.get_rank(), dist.get_world_size())))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def zero_redundancy(net: nn.Module) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes seconds, and most workers do not need it

    return ZeroRedundancyOptimizer(groups_of(net), torch.optim.AdamW, **OPTIONS)


def train_with_torch(folder: Path) -> tuple[list[float], list[Tensor]]:
    """Leaves the model, the consolidated state and that of each rank; returns how it goes on."""
    net = make_net()
    optimizer = zero_redundancy(net)
    model = DistributedDataParallel(net)
    train(model, optimizer, range(SAVED_AFTER))
    torch.save(optimizer.optim.state_dict(), folder / f"rank{dist.get_rank()}.pt")
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), folder / "whole.pt")
        torch.save(net.state_dict(), folder / "model.pt")
    losses = train(model, optimizer, range(SAVED_AFTER, SAVED_AFTER + CONTINUED))
    return losses, [param.detach().clone() for param in net.parameters()]


@pytest.fixture(scope="module")
def torch_run(
    run_on_ranks: RunOnRanks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[float], list[Tensor]]:
    """Where it has left its files, and how it went on."""
    folder = tmp_path_factory.mktemp("torch")
    losses, params = run_on_ranks(WORLD_SIZE, train_with_torch, folder)[0]
    return folder, losses, params


def read(folder: Path, form: str) -> Any:
    names = ["whole"] if form == "whole" else [f"rank{rank}" for rank in range(WORLD_SIZE)]
    files = [torch.load(folder / f"{name}.pt", weights_only=True, mmap=True) for name in names]
    return files[0] if form == "whole" else files


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = make_net()
    return net, torch.optim.AdamW(groups_of(net), lr=9.0)


def go_on(folder: Path, forms: list[str]) -> list[tuple[list[float], list[Tensor]]]:
    results = []
    for form in forms:
        model, optimizer = zeroopt.wrap(*build(), bucket_mb=0.002)
        model.load_state_dict(torch.load(folder / "model.pt", weights_only=True, mmap=True))
        optimizer.load_state_dict(from_zero_redundancy(read(folder, form), optimizer))
        losses = train(model, optimizer, range(SAVED_AFTER, SAVED_AFTER + CONTINUED))
        results.append((losses, [param.detach().clone() for param in model.parameters()]))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_goes_on_as_under_torch(run_on_ranks: RunOnRanks, torch_run: Any, world_size: int) -> None:
    folder, expected_losses, expected = torch_run
    for results in run_on_ranks(world_size, go_on, folder, ["whole", "ranks"]):
        for losses, params in results:
            assert losses == pytest.approx(expected_losses, rel=1e-5)
            torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)


def test_shards_are_the_consolidated_state(torch_run: Any) -> None:
    folder, *_ = torch_run
    _, optimizer = build()
    whole, joined = (from_zero_redundancy(read(folder, form), optimizer) for form in ("whole", "ranks"))
    assert whole["param_groups"] == joined["param_groups"]
    assert [group["lr"] for group in whole["param_groups"]] == [0.02, 0.01, 0.01]
    assert whole["state"].keys() == joined["state"].keys()
    for position, state in whole["state"].items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, joined["state"][position][key]) for key, value in state.items())
    optimizer.load_state_dict(joined)


def load_again(folder: Path) -> dict[str, Any]:
    """What a ZeroRedundancyOptimizer that has loaded state saves before its first step."""
    net = make_net()
    optimizer = zero_redundancy(net)
    optimizer.load_state_dict(torch.load(folder / "whole.pt", weights_only=True))
    optimizer.consolidate_state_dict(to=0)
    return optimizer.state_dict() if dist.get_rank() == 0 else {}


def test_state_that_was_loaded_before_is_whole(run_on_ranks: RunOnRanks, torch_run: Any) -> None:
    folder, *_ = torch_run
    _, optimizer = build()
    first = from_zero_redundancy(read(folder, "whole"), optimizer)["state"]
    again = from_zero_redundancy(run_on_ranks(WORLD_SIZE, load_again, folder)[0], optimizer)["state"]
    assert first.keys() == again.keys()
    assert all(torch.equal(again[position]["exp_avg"], state["exp_avg"]) for position, state in first.items())


def test_other_optimizers_and_missing_shards_are_refused(torch_run: Any) -> None:
    folder, *_ = torch_run
    net, optimizer = build()
    whole, shards = read(folder, "whole"), read(folder, "ranks")
    for saved in (shards[:1], shards[::-1], [*shards, shards[0]]):
        with pytest.raises(StateError, match=r"state dict.* has param_groups of .*all ranks, in their order"):
            from_zero_redundancy(saved, optimizer)
    with pytest.raises(StateError, match="a state dict of each rank, got none"):
        from_zero_redundancy([], optimizer)
    with pytest.raises(StateError, match=r"has param_groups of \[5, 2, 2\] parameters, expected \[9\]"):
        from_zero_redundancy(whole, torch.optim.AdamW(net.parameters()))
    groups = groups_of(net)
    groups[2]["params"].reverse()
    with pytest.raises(StateError, match=r"'exp_avg' of shape \[23, 18\] for parameter '7' of shape \[37, 18\]"):
        from_zero_redundancy(whole, torch.optim.AdamW(groups))
    assert not optimizer.state
