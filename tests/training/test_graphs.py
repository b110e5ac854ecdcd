"""Models and graphs of every structure train as under DistributedDataParallel: what a forward returns, recomputed and repeated
parts, several backward passes, and a user's own gradient hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from follow import STEPS, WIDTH, Prepare, averaged_by_hand, follow, inputs, layers, sgd, train, values, with_ddp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import loss_of
from worker_pool import RunOnRanks

# Parameter groups.


def train_groups(prepare: Prepare) -> list[Tensor]:
    """Groups with every option of their own, which change between steps; one is frozen by its rate."""
    net = layers(4)
    groups: list[dict[str, Any]] = [
        {"params": net[0].parameters(), "lr": 0.02, "betas": (0.5, 0.9), "weight_decay": 0.0},
        {"params": [net[1].weight, net[2].bias], "lr": 0.01, "eps": 1e-2, "weight_decay": 0.3},
        {"params": [net[1].bias, net[2].weight], "amsgrad": True, "maximize": True},
        {"params": net[3].parameters(), "lr": 0.0},
    ]
    model, optimizer = prepare(net, torch.optim.AdamW(groups, lr=0.005, eps=1e-3))
    for step in range(STEPS):
        loss_of(model(inputs(step, 4, WIDTH))).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["betas"] = (0.6, 0.95)
        optimizer.param_groups[1]["weight_decay"] *= 0.5
        optimizer.param_groups[3]["lr"] = 0.1 * step
    return values(net)


# What a forward returns.


@dataclass
class Answer:
    score: Tensor
    parts: dict[str, tuple[Tensor, ...]]
    name: str = "answer"


class Outputs(nn.Module):
    """Returns tensors inside of some container; only some of them go into the loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.trunk, self.head, self.spare = layers()

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(self.trunk(x))
        head, spare = self.head(x), self.spare(x)
        if self.kind == "dict":
            return {"score": head, "nested": {"spare": [spare]}, "text": "as it is"}
        if self.kind == "tuple":
            return (head, (spare, None), 3)
        return Answer(head, {"spare": (spare, x)})


SCORES: dict[str, Callable[[Any], Tensor]] = {
    "dict": lambda out: out["score"],
    "tuple": lambda out: out[0],
    "dataclass": lambda out: out.score,
}


def train_outputs(prepare: Prepare) -> list[Tensor]:
    params = []
    for kind, score in SCORES.items():

        def losses(model: nn.Module, step: int, score: Callable[[Any], Tensor] = score) -> list[Tensor]:
            return [loss_of(score(model(inputs(step, 4, WIDTH))))]

        params += train(prepare, Outputs(kind), losses)
    return params


# Activation checkpointing.


class Recomputed(nn.Module):
    """Layers whose activations are computed again in backward, one checkpoint for each; `again` runs some of them twice."""

    def __init__(self, reentrant: bool, again: bool) -> None:
        super().__init__()
        self.reentrant, self.order = reentrant, (0, 1, 0, 2) if again else (0, 1, 2)
        self.layers = layers()

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_()  # without which a reentrant checkpoint would yield no gradients
        for index in self.order:
            x = checkpoint(self._run, index, x, use_reentrant=self.reentrant)
        return x

    def _run(self, index: int, x: Tensor) -> Tensor:
        return torch.tanh(self.layers[index](x))


def recomputed(reentrant: bool, again: bool) -> Callable[[Prepare], list[Tensor]]:
    def train_recomputed(prepare: Prepare) -> list[Tensor]:
        net = Recomputed(reentrant, again)
        return train(prepare, net, lambda model, step: [loss_of(model(inputs(step, 4, WIDTH)))])

    return train_recomputed


def follow_checkpointing() -> None:
    for reentrant in (False, True):
        follow(recomputed(reentrant, again=False), with_ddp())
        # DDP can do this under static_graph only, and adds up in another order there. So do several reentrant backward passes.
        follow(recomputed(reentrant, again=True), averaged_by_hand, rounded=reentrant)


# Graphs.


def train_on_two_forwards(prepare: Prepare) -> list[Tensor]:
    """The model is used twice in one backward."""

    def losses(model: nn.Module, step: int) -> list[Tensor]:
        first, second = model(inputs(step, 4, WIDTH)), model(inputs(step + 100, 2, WIDTH))
        return [loss_of(first) + 0.3 * loss_of(second) + (first[:2] * second).mean()]

    return train(prepare, layers(), losses)


def train_recurrently(prepare: Prepare) -> list[Tensor]:
    """The model's output is its next input."""

    def losses(model: nn.Module, step: int) -> list[Tensor]:
        x = inputs(step, 4, WIDTH)
        for _ in range(3):
            x = torch.tanh(model(x))
        return [loss_of(x)]

    return train(prepare, layers(), losses)


def train_with_a_penalty(prepare: Prepare) -> list[Tensor]:
    """The loss contains a gradient by the inputs, so that backward goes through a backward."""

    def losses(model: nn.Module, step: int) -> list[Tensor]:
        x = inputs(step, 4, WIDTH).requires_grad_()
        loss = loss_of(torch.tanh(model(x)))
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return [loss + slope.square().sum()]

    return train(prepare, layers(), losses)


def train_with_two_backwards(prepare: Prepare) -> list[Tensor]:
    """One forward, the same graph twice."""

    def losses(model: nn.Module, step: int) -> list[Tensor]:
        out = torch.tanh(model(inputs(step, 4, WIDTH)))
        loss_of(out).backward(retain_graph=True)
        return [out.square().mean()]

    return train(prepare, layers(), losses)


def train_with_the_same_backward_twice(prepare: Prepare) -> list[Tensor]:
    def losses(model: nn.Module, step: int) -> list[Tensor]:
        loss = loss_of(model(inputs(step, 4, WIDTH)))
        loss.backward(retain_graph=True)
        return [loss]

    return train(prepare, layers(), losses)


def train_some(prepare: Prepare) -> list[Tensor]:
    """Each backward is told for which parameters."""
    net = layers()
    model, optimizer = prepare(net, sgd(net))
    for step in range(STEPS):
        loss_of(model(inputs(step, 4, WIDTH))).backward(inputs=[net[step % 3].weight, net[2].bias])
        optimizer.step()
        optimizer.zero_grad()
    return values(net)


def train_freezing_and_thawing(prepare: Prepare) -> list[Tensor]:
    """Layers that are frozen after wrapping, for some steps."""
    net = layers()

    def losses(model: nn.Module, step: int) -> list[Tensor]:
        net[0].requires_grad_(step != 1)
        net[2].requires_grad_(step != 0)
        return [loss_of(model(inputs(step, 4, WIDTH)))]

    return train(prepare, net, losses)


def train_adversarially(prepare: Prepare) -> list[Tensor]:
    """Two wrapped models, where backward goes through both of them and only one is stepped."""
    torch.manual_seed(0)
    maker, judge = nn.Linear(5, WIDTH), layers()
    (made_by, maker_optimizer), (judged, judge_optimizer) = prepare(maker, sgd(maker)), prepare(judge, sgd(judge))
    for step in range(STEPS):
        noise, real = inputs(step, 4, 5), inputs(step + 50, 4, WIDTH)
        judge_optimizer.zero_grad()
        (loss_of(judged(real)) - loss_of(judged(made_by(noise).detach())).tanh()).backward()
        judge_optimizer.step()
        maker_optimizer.zero_grad()
        loss_of(judged(made_by(noise))).tanh().backward()
        maker_optimizer.step()
    return [*values(maker), *values(judge)]


def follow_graphs() -> None:
    follow(train_groups, with_ddp())
    follow(train_outputs, averaged_by_hand)  # DDP wants every output in the loss
    for scenario in (train_on_two_forwards, train_recurrently, train_with_a_penalty, train_adversarially):
        follow(scenario, with_ddp())
    # DDP wants every parameter that it knows, and averages the first of two backward passes alone.
    for scenario in (train_some, train_freezing_and_thawing):
        follow(scenario, averaged_by_hand)
    for scenario in (train_with_two_backwards, train_with_the_same_backward_twice):
        follow(scenario, averaged_by_hand, rounded=True)


@pytest.mark.parametrize("world_size", [2, 3])
def test_graphs_and_outputs_follow_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, follow_graphs)


@pytest.mark.parametrize("world_size", [2, 3])
def test_checkpointing_follows_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, follow_checkpointing)


# A user's own hooks.


def train_with_parameter_hooks(prepare: Prepare) -> list[Tensor]:
    """Hooks on parameters see this rank's gradient, and what they make of it is averaged."""
    net, seen = layers(), []
    before, after = net[0].weight, net[1].weight

    def change(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return grad * (2 + dist.get_rank())

    before.register_hook(change)

    def losses(model: nn.Module, step: int) -> list[Tensor]:
        if step == 1:
            after.register_hook(change)
        return [loss_of(model(inputs(step, 4, WIDTH)))]

    params = train(prepare, net, losses)
    assert len(seen) == 2 * STEPS - 1
    return [*params, *seen]


def train_with_accumulation_hooks(prepare: Prepare) -> list[Tensor]:
    """Hooks that run when a parameter's gradient is complete, registered before wrapping, see `param.grad` of this rank."""
    net, seen = layers(), []

    def change(param: Tensor) -> None:
        assert param.grad is not None
        seen.append(param.grad.clone())
        param.grad.mul_(0.5 + dist.get_rank())

    def replace(param: Tensor) -> None:
        assert param.grad is not None
        param.grad = param.grad.clamp(-0.01, 0.01)

    net[0].weight.register_post_accumulate_grad_hook(change)
    net[2].bias.register_post_accumulate_grad_hook(replace)
    params = train(prepare, net, lambda model, step: [loss_of(model(inputs(step, 4, WIDTH)))])
    assert len(seen) == STEPS
    return [*params, *seen]


def train_with_module_hooks(prepare: Prepare) -> list[Tensor]:
    """Hooks on modules, the wrapped one too, see and change the gradients that pass."""
    net, seen = layers(), []

    def after_backward(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        seen.extend(grad.clone() for grad in (*grad_input, *grad_output) if grad is not None)
        return tuple(None if grad is None else grad * 1.5 for grad in grad_input)

    def before_backward(module: nn.Module, grad_output: Any) -> Any:
        return tuple(grad * (1 + dist.get_rank()) for grad in grad_output)

    def after_forward(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.tanh()

    net[1].register_full_backward_hook(after_backward)
    net[2].register_full_backward_pre_hook(before_backward)
    net[0].register_forward_hook(after_forward)
    model, optimizer = prepare(net, sgd(net))
    model.register_full_backward_hook(after_backward)
    model.register_forward_hook(after_forward)
    for step in range(STEPS):
        loss_of(model(inputs(step, 4, WIDTH).requires_grad_())).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == 4 * STEPS
    return [*values(net), *seen]


def follow_hooks() -> None:
    for scenario in (train_with_parameter_hooks, train_with_accumulation_hooks, train_with_module_hooks):
        follow(scenario, with_ddp())


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradient_hooks_follow_ddp(run_on_ranks: RunOnRanks, world_size: int) -> None:
    run_on_ranks(world_size, follow_hooks)
