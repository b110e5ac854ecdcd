"""A parameter is trained by one wrapped model at a time."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from follow import inputs, values
from torch import Tensor, nn
from worker_pool import RunOnRanks

import zeroopt


class Head(nn.Module):
    """A head on an encoder that it may share."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.encoder(x)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def actor_and_critic() -> tuple[Head, Head]:
    torch.manual_seed(0)
    encoder = Encoder()
    return Head(encoder), Head(encoder)


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1, momentum=0.9)


def wrap_both() -> tuple[list[str], bool]:
    """The second model has the encoder too. Nothing changes, and the first one goes on."""
    actor, critic = actor_and_critic()
    model, optimizer = zeroopt.wrap(actor, sgd(actor))
    addresses = [param.data_ptr() for param in critic.parameters()]
    messages = []
    for again in (critic, actor, actor.encoder):
        with pytest.raises(zeroopt.ConfigError) as caught:
            zeroopt.wrap(again, sgd(again))
        messages.append(str(caught.value))
    same = addresses == [param.data_ptr() for param in critic.parameters()]
    model(inputs(0, 4, 8)).sum().backward()
    optimizer.step()
    return messages, same


def test_two_models_cannot_train_one_parameter(run_on_ranks: RunOnRanks) -> None:
    for (shared, twice, part), same in run_on_ranks(2, wrap_both):
        assert same
        assert shared.startswith("parameter 'encoder.linear.weight' is trained by another wrapped model already")
        assert "put both models into one module" in shared
        assert twice.startswith("this model is already wrapped")
        assert "where it is 'encoder.linear.weight'" in part


def train_separately(stage: int | None, first: str) -> list[Tensor]:
    """One model trains the encoder, the other one's loss passes through it too. Plain averaging where `stage` is None."""
    actor, critic = actor_and_critic()
    order = [(actor, sgd(actor)), (critic, sgd(critic.out))]
    if first == "critic":
        order.reverse()
    if stage is not None:
        order = [zeroopt.wrap(*pair, stage=stage, bucket_mb=0.001, fused=False) for pair in order]
    for step in range(3):
        for model, optimizer in order:
            for _, each in order:
                each.zero_grad()
            (model(inputs(step, 4, 8)) - 1).square().mean().backward()
            for param in (*actor.parameters(), *critic.out.parameters()) if stage is None else ():
                if param.grad is not None:
                    param.grad /= dist.get_world_size()
                    dist.all_reduce(param.grad)
            optimizer.step()
    return values(actor) + values(critic.out)


def train_separately_all(first: str) -> list[list[Tensor]]:
    return [train_separately(stage, first) for stage in (None, 0, 1, 2)]


@pytest.mark.parametrize("first", ["actor", "critic"])
def test_a_model_may_use_what_another_one_trains(run_on_ranks: RunOnRanks, first: str) -> None:
    for expected, *stages in run_on_ranks(2, train_separately_all, first):
        for got in stages:
            for want, have in zip(expected, got, strict=True):
                torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-7)


def wrap_anew(options: dict[str, object], *, clear: bool) -> tuple[list[Tensor], int] | str:
    """Two runs over one model, one after the other."""
    net = Head(Encoder())
    with torch.no_grad():
        for number, param in enumerate(net.parameters()):
            param.fill_(0.1 * number)
    gc.disable()
    try:
        for run in range(3):
            model, optimizer = zeroopt.wrap(net, sgd(net), **options)
            for step in range(2):
                model(inputs(10 * run + step, 4, 8)).sum().backward()
                optimizer.step()
            if clear:
                optimizer.zero_grad()
            del model, optimizer
    except zeroopt.ConfigError as error:
        return str(error)
    finally:
        gc.enable()
    return values(net), len(net.out.weight._post_accumulate_grad_hooks)


@pytest.mark.parametrize("options", [{"stage": 0}, {"stage": 2}, {"stage": 2, "share_parameters": True}])
def test_a_model_whose_first_run_is_over(run_on_ranks: RunOnRanks, options: dict[str, object]) -> None:
    ranks = run_on_ranks(2, wrap_anew, options, clear=True)
    assert all(map(torch.equal, ranks[0][0], ranks[1][0]))
    assert ranks[0][1] == 1
    single = run_on_ranks(2, wrap_anew, {"stage": 1}, clear=True)
    assert all(map(torch.equal, ranks[0][0], single[0][0]))


def test_gradients_of_a_run_that_is_over(run_on_ranks: RunOnRanks) -> None:
    for message in run_on_ranks(2, wrap_anew, {"stage": 2}, clear=False):
        assert message.startswith(
            "parameter 'encoder.linear.weight' has a sharded gradient of a wrapped model that is gone"
        )
