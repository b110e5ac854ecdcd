"""Gradients of parameters that no optimizer trains are those of DDP: on every rank, and in every norm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from follow import STEPS, WIDTH, Prepare, inputs, values, with_ddp, with_zeroopt
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from training import loss_of
from worker_pool import RunOnRanks

import zeroopt


class Branches(nn.Module):
    """A trunk, branches that only some ranks use, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.even, self.odd, self.never, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.gain = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.trunk(x)) * self.gain.float()
        x = self.even(x) if dist.get_rank() % 2 == 0 else self.odd(x)
        return self.head(x)

    def others(self) -> list[nn.Parameter]:
        own = set(self.head.parameters())
        return [param for param in self.parameters() if param not in own]


def grads(net: nn.Module, *parts: str) -> list[Tensor]:
    return [p.grad.clone() for n, p in net.named_parameters() if p.grad is not None and n.startswith(parts)]


UNTRAINED = ("trunk", "even", "odd", "never", "gain")


def clip_all(clears: str, micro: int = 1, *, no_sync: bool = False) -> Callable[[Prepare], list[Tensor]]:
    def run(prepare: Prepare) -> list[Tensor]:
        net = Branches()
        model, optimizer = prepare(net, torch.optim.SGD(net.head.parameters(), lr=0.5))
        seen: list[Tensor] = []
        for step in range(STEPS):
            for number in range(micro):
                alone = no_sync and number < micro - 1
                with model.no_sync() if alone else nullcontext():  # type: ignore[operator]
                    loss_of(model(inputs(10 * step + number, 4, WIDTH))).backward()
            seen += grads(net, *UNTRAINED)
            clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            (model if clears == "model" else optimizer).zero_grad()
        assert all(param.grad is None for param in net.never.parameters())
        return [*values(net), *seen]

    return run


def follow_clipping() -> None:
    for scenario in (
        clip_all("optimizer"),
        clip_all("model"),
        clip_all("model", micro=3),
        clip_all("model", micro=3, no_sync=True),
    ):
        expected = scenario(with_ddp(find_unused_parameters=True))
        for stage in (0, 1, 2):
            got = scenario(with_zeroopt(stage=stage, fused=False))
            for want, have in zip(expected, got, strict=True):  # norms of slices are summed in another order
                torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("world_size", [2, 3])
def test_clipping_follows_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, follow_clipping)


def means(net: Branches, step: int, *parts: str) -> list[Tensor]:
    """Of gradients of a plain model over ranks, one backward."""
    for param in net.parameters():
        param.grad = None
    loss_of(net(inputs(step, 4, WIDTH))).backward()
    result = []
    for name, param in net.named_parameters():
        if name.startswith(parts) and param.requires_grad:
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            dist.all_reduce(grad)
            result.append(grad / dist.get_world_size())
    return result


def check_means(net: Branches, model: nn.Module, step: int, *parts: str) -> None:
    plain = Branches()
    plain.load_state_dict(net.state_dict())
    for mine, other in zip(plain.parameters(), net.parameters(), strict=True):
        mine.requires_grad_(other.requires_grad)
    expected = [mean for mean in means(plain, step, *parts) if mean.any()]
    model.zero_grad()
    loss_of(model(inputs(step, 4, WIDTH))).backward()
    got = grads(net, *parts)
    assert got and len(got) == len(expected)
    for want, have in zip(expected, got, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-7)


def grow(stage: int) -> None:
    """What is untrained changes: by unfreezing, further groups, and a further optimizer."""
    net = Branches()
    net.even.requires_grad_(False)
    net.odd.requires_grad_(False)
    net.gain.requires_grad_(False)
    model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.head.parameters(), lr=0.1), stage=stage, bucket_mb=0.001)
    check_means(net, model, 0, "trunk")
    net.even.requires_grad_(True)
    net.odd.requires_grad_(True)
    check_means(net, model, 1, "trunk", "even", "odd")
    optimizer.add_param_group({"params": list(net.even.parameters())})
    check_means(net, model, 2, "trunk", "odd")
    assert net.even.weight.grad is None or stage == 0 or type(net.even.weight.grad) is not Tensor
    zeroopt.wrap(model, torch.optim.SGD(net.odd.parameters(), lr=0.1), stage=stage, bucket_mb=0.001)
    check_means(net, model, 3, "trunk")
    before = values(net.trunk)
    optimizer.step()
    assert all(map(torch.equal, before, values(net.trunk)))


def grow_in_all_stages() -> None:
    for stage in (0, 1, 2):
        grow(stage)


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_is_untrained_may_change(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, grow_in_all_stages)


def backward_past_the_trained(stage: int) -> list[bool]:
    """Losses of untrained parameters alone; and a rank without a backward."""
    net = Branches()
    model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.head.parameters(), lr=0.1), stage=stage)
    before = values(net)
    net.trunk(inputs(0, 4, WIDTH)).sum().backward()
    mean = net.trunk.weight.grad.clone()
    everyone = [torch.empty_like(mean) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mean)
    optimizer.step()
    unchanged = all(map(torch.equal, before, values(net)))
    model.zero_grad()
    if dist.get_rank() == 0:
        net.trunk(inputs(0, 4, WIDTH)).sum().backward()
    optimizer.step()
    has_half = net.trunk.weight.grad is not None and bool(net.trunk.weight.grad.any())
    return [all(torch.equal(mean, one) for one in everyone), unchanged, has_half]


@pytest.mark.parametrize("stage", [0, 2])
def test_backwards_of_untrained_parameters_alone(run_on_ranks: RunOnRanks, stage: int) -> None:
    assert run_on_ranks(2, backward_past_the_trained, stage) == [[True] * 3] * 2


def join(divide_by_all: bool) -> list[Tensor]:
    """Rank 1 has one batch more."""
    net = Branches()
    model, optimizer = zeroopt.wrap(net, torch.optim.SGD(net.head.parameters(), lr=0.1), stage=2)
    with model.join(divide_by_initial_world_size=divide_by_all):
        for step in range(2 + dist.get_rank()):
            loss_of(model(inputs(step, 4, WIDTH))).backward()
            optimizer.step()
            model.zero_grad() if step < 2 else optimizer.zero_grad()
    return grads(net, "odd")


def test_join(run_on_ranks: RunOnRanks) -> None:
    by_all = run_on_ranks(2, join, True)
    by_some = run_on_ranks(2, join, False)
    for ranks in (by_all, by_some):
        assert all(map(torch.equal, ranks[0], ranks[1])) and len(ranks[0]) == 2
    for half, whole in zip(by_all[0], by_some[0], strict=True):
        torch.testing.assert_close(half * 2, whole)


def unfreeze_differently() -> str:
    net = Branches()
    net.even.requires_grad_(False)
    net.odd.requires_grad_(False)
    model, _ = zeroopt.wrap(net, torch.optim.SGD(net.head.parameters(), lr=0.1))
    (net.even if dist.get_rank() == 0 else net.odd).requires_grad_(True)
    with pytest.raises(zeroopt.RankMismatchError) as caught:
        model(inputs(0, 4, WIDTH))
    return str(caught.value)


def test_ranks_that_unfreeze_something_else(run_on_ranks: RunOnRanks) -> None:
    messages = run_on_ranks(2, unfreeze_differently)
    assert messages == [messages[0]] * 2
    assert "rank 0 has [parameter 'even.weight'" in messages[0] and "'odd.weight'" in messages[0]


def train_alone() -> bool:
    net = Branches()
    model, _ = zeroopt.wrap(net, torch.optim.SGD(net.head.parameters(), lr=0.1), average_every=2)
    plain = Branches()
    loss_of(plain(inputs(0, 4, WIDTH))).backward()
    loss_of(model(inputs(0, 4, WIDTH))).backward()
    return all(map(torch.equal, grads(plain, *UNTRAINED), grads(net, *UNTRAINED)))


def test_ranks_that_train_alone_average_nothing(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(2, train_alone) == [True, True]
