"""Hooks by which tools look at gradients and change them see and do what they do under DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import torch
from follow import Prepare, follow, inputs, sgd, values, with_ddp
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from training import loss_of
from worker_pool import RunOnRanks

STEPS = 3
WIDTH = 12


class Seen:
    """What hooks were given, by who was: in which order gradients come is autograd's."""

    def __init__(self) -> None:
        self._by_name: dict[str, list[Tensor]] = {}

    def note(self, name: str, *found: Tensor | None) -> None:
        kept = self._by_name.setdefault(name, [])
        kept += [value.detach().clone() for value in found if value is not None]

    def all(self) -> list[Tensor]:
        return [value for name in sorted(self._by_name) for value in self._by_name[name]]

    def names(self) -> set[str]:
        return {name.split(" ")[0] for name in self._by_name}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 5))


def watch(model: nn.Module, seen: Seen) -> None:
    """As `wandb.watch(model, log="all")`: gradients by hooks of parameters, parameters by hooks of forwards."""
    for name, param in model.named_parameters():
        name = name.removeprefix("module.")
        param.register_hook(lambda grad, name=name: seen.note(f"gradient {name}", grad.data))
    model.register_forward_hook(
        lambda module, *_: [seen.note(f"parameter {n}", p.data) for n, p in module.named_parameters()] and None
    )


def watched(prepare: Prepare) -> list[Tensor]:
    """One is watched before it is wrapped, and one after."""
    result: list[Tensor] = []
    for wraps_first in (True, False):
        bare, seen = net(), Seen()
        if not wraps_first:
            watch(bare, seen)
        model, optimizer = prepare(bare, sgd(bare))
        if wraps_first:
            watch(model, seen)
        run(model, optimizer)
        assert seen.names() == {"gradient", "parameter"}
        result += [*seen.all(), *values(bare)]
    return result


def run(model: nn.Module, optimizer: torch.optim.Optimizer, change: Any = None) -> None:
    for step in range(STEPS):
        output = model(inputs(step, 4, WIDTH))
        if change is not None:
            output.register_hook(change)
        loss_of(output).backward()
        optimizer.step()
        optimizer.zero_grad()


def hooked(prepare: Prepare) -> list[Tensor]:
    """Hooks of modules, of tensors, of several parameters at a time, and of steps; some change what they are given."""
    bare, seen = net(), Seen()
    bare[0].weight.register_post_accumulate_grad_hook(
        lambda param: seen.note("accumulated before wrapping", param.grad)
    )
    model, optimizer = prepare(bare, sgd(bare))
    bare[3].weight.register_post_accumulate_grad_hook(lambda param: seen.note("accumulated", param.grad))
    model.register_full_backward_hook(lambda module, grads, outputs: seen.note("model", *outputs))
    bare[0].register_full_backward_hook(lambda module, grads, outputs: seen.note("layer", *outputs))
    bare[3].register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))
    bare[2].register_full_backward_hook(lambda module, grads, outputs: (grads[0].clamp(-0.01, 0.01),))
    register_multi_grad_hook([*bare.parameters()], lambda grads: seen.note("several", *grads))
    optimizer.register_step_post_hook(lambda *_: seen.note("step", *bare.parameters()))
    run(model, optimizer, lambda grad: grad.clamp(-0.05, 0.05))
    assert seen.names() == {"accumulated", "model", "layer", "several", "step"}
    return [*seen.all(), *values(bare)]


def follow_hooks() -> None:
    follow(watched, with_ddp())
    follow(hooked, with_ddp())


def test_hooks_follow_ddp(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(2, follow_hooks)
