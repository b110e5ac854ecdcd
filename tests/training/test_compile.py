"""torch.compile of a model, before it is wrapped, after that, and between steps.

The backend "aot_eager" compiles all but the kernels, which takes ten seconds less than "inductor".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from follow import STEPS, Prepare, follow, inputs, sgd, values, with_ddp
from torch import Tensor, nn
from training import build, loss_of
from worker_pool import RunOnRanks, forget_compiled_code

import zeroopt
from zeroopt.parameters.arriving import ArrivingParameter

TIMEOUT_S = 180.0  # a worker's first use of the compiler imports half of torch
BACKEND = "aot_eager"


@contextmanager
def no_trace_of_compilation() -> Iterator[None]:
    """For those that train after this in the same test."""
    try:
        yield
    finally:
        forget_compiled_code()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        loss_of(model(inputs(step, 4, 7))).backward()
        optimizer.step()
        optimizer.zero_grad()


def compiled_before(prepare: Prepare) -> list[Tensor]:
    net = build("mlp")
    model, optimizer = prepare(torch.compile(net, backend=BACKEND), sgd(net))  # type: ignore[arg-type]
    train(model, optimizer, range(STEPS))
    return values(net)


def compiled_to_machine_code(prepare: Prepare) -> list[Tensor]:
    """By Inductor, whose code takes the addresses of parameters and nothing else of them."""
    net = build("mlp")
    model, optimizer = prepare(torch.compile(net), sgd(net))  # type: ignore[arg-type]
    train(model, optimizer, range(STEPS))
    return values(net)


def compiled_in_place(prepare: Prepare) -> list[Tensor]:
    net = build("mlp")
    net.compile(backend=BACKEND)
    model, optimizer = prepare(net, sgd(net))
    train(model, optimizer, range(STEPS))
    return values(net)


def compiled_in_part(prepare: Prepare) -> list[Tensor]:
    net = build("mlp")
    net.layers[2] = torch.compile(net.layers[2], backend=BACKEND)
    model, optimizer = prepare(net, sgd(net))
    train(model, optimizer, range(STEPS))
    return values(net)


def compiled_after(prepare: Prepare) -> list[Tensor]:
    net = build("mlp")
    model, optimizer = prepare(net, sgd(net))
    train(torch.compile(model, backend=BACKEND), optimizer, range(STEPS))  # type: ignore[arg-type]
    return values(net)


def compiled_between_steps(prepare: Prepare) -> list[Tensor]:
    """Parameters of the last step may still be on their way when they are first seen by the compiler."""
    net = build("mlp")
    model, optimizer = prepare(net, sgd(net))
    train(model, optimizer, range(2))  # the first step waits for all parameters, to plan buckets anew
    if getattr(optimizer, "stage", 0) > 0:
        assert any(isinstance(param, ArrivingParameter) for param in net.parameters())
    train(torch.compile(model, backend=BACKEND), optimizer, range(2, STEPS))  # type: ignore[arg-type]
    return values(net)


def compiled_with_the_step(prepare: Prepare) -> list[Tensor]:
    """One function that holds all of a training step, some of which no compiler can trace."""
    net = build("mlp")
    model, optimizer = prepare(net, sgd(net))

    @torch.compile(backend=BACKEND)
    def step(x: Tensor) -> None:
        loss_of(model(x)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    for number in range(STEPS):
        step(inputs(number, 4, 7))
    return values(net)


def compiled_step_alone(prepare: Prepare) -> list[Tensor]:
    """As plain optimizers are compiled; here the kernels are already."""
    net = build("mlp")
    model, optimizer = prepare(net, sgd(net))
    compiled = torch.compile(optimizer.step, backend=BACKEND) if hasattr(optimizer, "stage") else optimizer.step
    for number in range(STEPS):
        loss_of(model(inputs(number, 4, 7))).backward()
        compiled()
        optimizer.zero_grad()
    return values(net)


def follow_compiled(scenario: Callable[[Prepare], list[Tensor]]) -> None:
    clips = scenario is compiled_with_the_step  # by a norm, whose squares are added in another order
    # Of stage 1, a compiler sees what it sees of stage 2, and compiling takes seconds.
    follow(no_trace_of_compilation()(scenario), with_ddp(), rounded=clips, stages=(0, 2))


@pytest.mark.parametrize(
    ("scenario", "world_size"),
    [
        (compiled_before, 2),
        (compiled_in_place, 2),
        (compiled_in_part, 2),
        (compiled_after, 2),
        (compiled_after, 3),
        (compiled_between_steps, 2),
        (compiled_with_the_step, 2),
        (compiled_step_alone, 2),
    ],
)
def test_compiled_models_follow_ddp(
    run_on_ranks: RunOnRanks, scenario: Callable[[Prepare], list[Tensor]], world_size: int
) -> None:
    run_on_ranks(world_size, follow_compiled, scenario, timeout=TIMEOUT_S)


def compiled_graphs(how: str, foresight: bool) -> int:
    """How often a compiler is asked, in three steps of stage 2."""
    from torch._dynamo.utils import counters

    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, sgd(net))
    assert model.features.foresight is not None
    if not foresight:
        model.features.foresight.forget()
    before = counters["stats"]["unique_graphs"]
    runs: nn.Module = model
    if how == "in parts":
        for layer in net.layers[::2]:
            layer.compile(backend=BACKEND, fullgraph=True)
    else:
        runs = torch.compile(model if how == "around" else net, backend=BACKEND)  # type: ignore[assignment]
    train(runs, optimizer, range(3))
    assert not model.replica.reducer.is_ahead
    return counters["stats"]["unique_graphs"] - before


@no_trace_of_compilation()
def compare_numbers_of_graphs(how: str) -> None:
    forget_compiled_code()
    expected = compiled_graphs(how, foresight=False)
    forget_compiled_code()
    assert compiled_graphs(how, foresight=True) == expected > 0


@pytest.mark.parametrize("how", ["around", "within", "in parts"])
def test_what_watches_the_first_forward_has_nothing_compiled_again(run_on_ranks: RunOnRanks, how: str) -> None:
    run_on_ranks(2, compare_numbers_of_graphs, how, timeout=TIMEOUT_S)


def follow_machine_code(cache: str) -> None:
    import torch._inductor.config

    with (
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
        torch._inductor.config.patch(compile_threads=1),  # more of them are processes, which stay
    ):
        follow_compiled(compiled_to_machine_code)


def test_machine_code_follows_ddp(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, follow_machine_code, str(tmp_path), timeout=TIMEOUT_S)
