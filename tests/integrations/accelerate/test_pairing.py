"""`prepare` brings models and their optimizers together, in whatever order they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from follow import WIDTH, inputs, layers, values
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from worker_pool import RunOnRanks

import zeroopt

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from accelerators import accelerator

from zeroopt.integrations.accelerate import ZeroAccelerator, enable, pairing
from zeroopt.integrations.accelerate.optimizers import plain_optimizer

STEPS = 6

Trained = tuple[Any, Any, Any]
Prepare = Callable[[Accelerator, nn.Module, torch.optim.Optimizer, Any], Trained]


def together(acc: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> Trained:
    return acc.prepare(model, optimizer, scheduler)  # type: ignore[no-any-return]


def backwards(acc: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> Trained:
    scheduler, optimizer, model = acc.prepare(scheduler, optimizer, model)
    return model, optimizer, scheduler


def model_first(acc: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> Trained:
    return acc.prepare(model), acc.prepare(optimizer), acc.prepare(scheduler)


def optimizer_first(acc: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> Trained:
    optimizer = acc.prepare(optimizer)
    scheduler = acc.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler.lr_lambdas[0]))
    return acc.prepare(model), optimizer, scheduler


def train(acc: Accelerator, prepare: Prepare = together) -> list[Tensor]:
    """Losses, learning rates and parameters of some accumulated steps."""
    net = layers()
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, scheduler = prepare(acc, net, optimizer, scheduler)
    assert isinstance(model, zeroopt.ZeroDataParallel if isinstance(acc, ZeroAccelerator) else DistributedDataParallel)
    seen: list[Tensor] = []
    for number in range(STEPS):
        with acc.accumulate(model):
            loss = model(inputs(number, 4, WIDTH)).square().mean()
            acc.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        seen += [loss.detach(), torch.tensor(scheduler.get_last_lr())]
    assert acc.unwrap_model(model) is extract_model_from_parallel(model) is net
    return [*seen, *values(net)]


def follow_ddp(prepare: Prepare) -> None:
    with accelerator(gradient_accumulation_steps=2) as acc:
        expected = train(acc)
    for stage in (0, 1, 2):
        with accelerator(gradient_accumulation_steps=2) as acc:
            assert enable(acc, stage=stage, fused=False) is acc
            assert enable(acc, stage=stage, fused=False) is acc
            got = train(acc, prepare)
            assert all(map(torch.equal, expected, got)), stage
            assert [plain_optimizer(one).stage for one in acc._optimizers] == [stage]


@pytest.mark.parametrize("prepare", [together, backwards, model_first, optimizer_first])
def test_prepare_in_any_order_trains_like_ddp(run_on_ranks: RunOnRanks, prepare: Prepare) -> None:
    run_on_ranks(2, follow_ddp, prepare)


def adversaries(acc: Accelerator) -> list[Tensor]:
    """Two models that are trained in turn, each by an optimizer of its own, the first by two; and one that is frozen."""
    torch.manual_seed(0)
    maker, judge, fixed = layers(), layers(), layers()
    fixed.requires_grad_(False)
    weights = torch.optim.SGD([p for p in maker.parameters() if p.ndim > 1], lr=0.1, momentum=0.9)
    biases = torch.optim.SGD([p for p in maker.parameters() if p.ndim == 1], lr=0.1)
    judging = torch.optim.SGD(judge.parameters(), lr=0.1)
    fixed = acc.prepare_model(fixed, evaluation_mode=True)
    make, weights, say, judging = acc.prepare(maker, weights, judge, judging)
    biases = acc.prepare(biases)
    for number in range(4):
        noise = inputs(number, 4, WIDTH)
        judged = say(fixed(make(noise).detach()))
        acc.backward(judged.square().mean())
        judging.step()
        judging.zero_grad()
        acc.backward(make(noise).square().mean())
        weights.step()
        biases.step()
        weights.zero_grad()
        biases.zero_grad()
    return [*values(maker), *values(judge)]


def several(reverse: bool) -> None:
    with accelerator() as acc:
        expected = adversaries(acc)
    with accelerator() as acc:
        got = adversaries(enable(acc, fused=False, bucket_mb=0.001))
        assert len(acc._models) == 3 and len(acc._optimizers) == 3
        assert [len(getattr(model, "optimizers", ())) for model in acc._models] == [0, 2, 1]
        assert all(map(torch.equal, expected, got))


def test_several_models_and_optimizers(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, several, False)


def in_waiting() -> None:
    with accelerator() as acc:
        enable(acc, fused=False)
        net = layers()
        frozen = acc.prepare(layers().requires_grad_(False))
        assert type(frozen) is nn.Sequential and acc.prepare(frozen) is frozen
        model = acc.prepare(net)
        assert acc.prepare(model) is model is acc.prepare(net)
        assert repr(net) in repr(model) and [*model.state_dict()] == [*dict(model.named_parameters())] == [
            *net.state_dict()
        ]
        model.load_state_dict(net.state_dict())
        with torch.no_grad():
            assert torch.equal(model(inputs(0, 4, WIDTH)), net(inputs(0, 4, WIDTH)))
        with pytest.raises(zeroopt.StateError, match="its optimizer has not"):
            model(inputs(0, 4, WIDTH))
        optimizer = acc.prepare(torch.optim.SGD(layers().parameters(), lr=0.1))
        with pytest.raises(zeroopt.StateError, match="the model that has its parameters has not"):
            optimizer.step()
        acc.free_memory()
        with pytest.raises(zeroopt.ConfigError, match="is not a parameter of the model"):
            acc.prepare(torch.optim.SGD([*net.parameters(), *layers().parameters()], lr=0.1))
        assert not acc._optimizers
        assert not isinstance(model, zeroopt.ZeroDataParallel) or not model.optimizers


def test_what_has_not_met_its_other_half_does_not_train(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, in_waiting)


def in_waiting_and_eval() -> None:
    with accelerator() as acc:
        enable(acc, fused=False)
        net = layers().eval()
        model = acc.prepare(net)
        x = inputs(0, 4, WIDTH).requires_grad_()
        (of_inputs,) = torch.autograd.grad(model(x).sum(), x)
        assert of_inputs.any()
        with pytest.raises(zeroopt.StateError, match="its optimizer has not"):
            model(x).sum().backward()
        assert all(param.grad is None for param in net.parameters())
        optimizer = acc.prepare(torch.optim.SGD(net.parameters(), lr=0.1))
        before = values(net)
        acc.backward(model(x).sum())
        optimizer.step()
        assert not any(map(torch.equal, before, values(net)))
        assert not any(param._backward_hooks for param in net.parameters())


def test_a_model_in_eval_does_not_train_without_its_optimizer(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, in_waiting_and_eval)


def trained_again(acc: Accelerator) -> list[Tensor]:
    """Twice, with the same model and new optimizers: as a second Trainer does, and as a loop that looks for a batch size."""
    net = layers()
    model, former = None, None
    for given in (net, net, "model", "unwrapped"):
        if given == "unwrapped" and isinstance(model, zeroopt.ZeroDataParallel):
            assert zeroopt.unwrap(model, plain_optimizer(optimizer))[0] is net  # noqa: F821
        if given is net:
            acc.free_memory()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        model, optimizer = acc.prepare(model if given == "model" else net, optimizer)
        for number in range(2):
            acc.backward(model(inputs(number, 4, WIDTH)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if isinstance(model, zeroopt.ZeroDataParallel):
            assert acc._models == [model] and acc._optimizers == [optimizer]
            if former is not None:
                with pytest.raises(zeroopt.StateError, match=r"zeroopt\.unwrap has undone that"):
                    former.step()
        former = optimizer
    return values(net)


def again() -> None:
    with accelerator() as acc:
        expected = trained_again(acc)
    with accelerator() as acc:
        got = trained_again(enable(acc, fused=False, bucket_mb=0.001))
        assert all(map(torch.equal, expected, got))


def test_a_model_is_prepared_again_with_another_optimizer(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, again)


def fill(module: nn.Module) -> None:
    for param in module.parameters(recurse=False):
        param.detach().fill_(0.1)


def built_where_it_lies() -> None:
    with accelerator() as acc, torch.device("meta"):
        net = layers()
    with accelerator() as acc, patch.object(pairing, "wrap", wraps=zeroopt.wrap) as wrap:
        enable(acc, init=fill)
        model, optimizer = acc.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        assert wrap.call_args.kwargs["device"] == acc.device
        other = layers()
        acc.prepare(other, torch.optim.SGD(other.parameters(), lr=0.1))
        assert "device" not in wrap.call_args.kwargs
        assert all(torch.equal(param, torch.full_like(param, 0.1)) for param in net.parameters())
        acc.backward(model(inputs(0, 4, WIDTH)).square().mean())
        optimizer.step()


def test_a_model_on_the_meta_device_is_made_when_its_optimizer_comes(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, built_where_it_lies)


def wrapped_by_hand(acc: Accelerator) -> list[Tensor]:
    """The user has called `zeroopt.wrap`, for the weights, and leaves the biases to `prepare`."""
    net = layers()
    weights: Any = torch.optim.SGD([p for p in net.parameters() if p.ndim > 1], lr=0.1, momentum=0.9)
    biases: Any = torch.optim.SGD([p for p in net.parameters() if p.ndim == 1], lr=0.1)
    model: nn.Module = net
    if isinstance(acc, ZeroAccelerator):
        model, weights = zeroopt.wrap(net, weights, fused=False, bucket_mb=0.001)
    model, weights = acc.prepare(model, weights)
    biases = acc.prepare(biases)
    for number in range(3):
        acc.backward(model(inputs(number, 4, WIDTH)).square().mean())
        for optimizer in (weights, biases):
            optimizer.step()
            optimizer.zero_grad()
    assert acc.unwrap_model(model) is net
    return values(net)


def by_hand() -> None:
    with accelerator(mixed_precision="bf16") as acc:
        expected = wrapped_by_hand(acc)
    with accelerator(mixed_precision="bf16") as acc:
        got = wrapped_by_hand(enable(acc, fused=False, bucket_mb=0.001))
        assert all(map(torch.equal, expected, got))


def test_what_was_wrapped_by_hand_is_prepared(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, by_hand)
