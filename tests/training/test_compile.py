"""torch.compile of a model, before it is wrapped, after that, and between steps.

The backend "aot_eager" compiles all but the kernels, which takes ten seconds less than "inductor".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from follow import STEPS, Prepare, follow, inputs, sgd, values, with_ddp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import build, loss_of
from worker_pool import RunOnRanks, forget_compiled_code

import zeroopt
from zeroopt.errors import NotSupportedError
from zeroopt.parameters.arriving import ArrivingParameter

BACKEND = "aot_eager"


def count(of: str) -> int:
    """What the compiler has done so far: "unique_graphs", or "graph_break"."""
    from torch._dynamo.utils import counters  # imports half of torch

    return sum(counters[of].values()) if of == "graph_break" else counters["stats"][of]


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
    run_on_ranks(world_size, follow_compiled, scenario)


def compiled_graphs(how: str, foresight: bool) -> int:
    """How often a compiler is asked, in three steps of stage 2."""
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, sgd(net))
    assert model.features.foresight is not None
    if not foresight:
        model.features.foresight.forget()
    before = count("unique_graphs")
    runs: nn.Module = model
    if how == "in parts":
        for layer in net.layers[::2]:
            layer.compile(backend=BACKEND, fullgraph=True)
    else:
        runs = torch.compile(model if how == "around" else net, backend=BACKEND)  # type: ignore[assignment]
    train(runs, optimizer, range(3))
    assert not model.replica.reducer.is_ahead
    return count("unique_graphs") - before


@no_trace_of_compilation()
def compare_numbers_of_graphs(how: str) -> None:
    forget_compiled_code()
    expected = compiled_graphs(how, foresight=False)
    forget_compiled_code()
    assert compiled_graphs(how, foresight=True) == expected > 0


@pytest.mark.parametrize("how", ["around", "within", "in parts"])
def test_what_watches_the_first_forward_has_nothing_compiled_again(run_on_ranks: RunOnRanks, how: str) -> None:
    run_on_ranks(2, compare_numbers_of_graphs, how)


def follow_machine_code(cache: str) -> None:
    import torch._inductor.config

    with (
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
        torch._inductor.config.patch(compile_threads=1),  # more of them are processes, which stay
    ):
        follow_compiled(compiled_to_machine_code)


def test_machine_code_follows_ddp(run_on_ranks: RunOnRanks, tmp_path: Path) -> None:
    run_on_ranks(2, follow_machine_code, str(tmp_path))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks that are alike, as those of a transformer, between layers that are not."""

    def __init__(self, checkpoints: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.head = nn.Linear(16, 5, bias=False)
        self.checkpoints = checkpoints

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.head(x)


def whole(net: nn.Module, model: nn.Module) -> nn.Module:
    """Compiled around what `wrap` has returned."""
    return torch.compile(model, backend=GRAPHS_ONLY, fullgraph=True)  # type: ignore[return-value]


def bare(net: nn.Module, model: nn.Module) -> nn.Module:
    """The model that was wrapped."""
    return torch.compile(net, backend=GRAPHS_ONLY, fullgraph=True)  # type: ignore[return-value]


def in_place(net: nn.Module, model: nn.Module) -> nn.Module:
    model.compile(backend=GRAPHS_ONLY, fullgraph=True)
    return model


def blocks_in_place(net: Net, model: nn.Module) -> nn.Module:
    for block in net.blocks:
        block.compile(backend=GRAPHS_ONLY, fullgraph=True)
    return model


def blocks_replaced(net: Net, model: nn.Module) -> nn.Module:
    for number, block in enumerate(net.blocks):
        net.blocks[number] = torch.compile(block, backend=GRAPHS_ONLY, fullgraph=True)
    return model


def blocks_forward(net: Net, model: nn.Module) -> nn.Module:
    for block in net.blocks:
        block.forward = torch.compile(block.forward, backend=GRAPHS_ONLY, fullgraph=True)  # type: ignore[method-assign]
    return model


def layer_of_torchs(net: Net, model: nn.Module) -> nn.Module:
    """Whose forward is none that a compiler looks into by itself."""
    net.embed = torch.compile(net.embed, backend=GRAPHS_ONLY, fullgraph=True)
    return model


def both(net: Net, model: nn.Module) -> nn.Module:
    """Blocks, and all around them."""
    return whole(net, blocks_in_place(net, model))


Way = Callable[[Any, nn.Module], nn.Module]
GRAPHS_ONLY = "eager"  # a backend that makes nothing of graphs: bits are those of the model that is not compiled
SIZES = (4, 4, 4, 6, 4, 5, 4)  # rows of a batch: a dimension that is found to be dynamic
SETTLED = 4  # steps, after which nothing is compiled any more


@dataclass
class Course:
    """What a training has come to.

    Attributes:
        params: in the end.
        new_graphs: by step.
        on_their_way: parameters that `step()` has left to their readers, by step.
        breaks: of graphs, in all.
    """

    params: list[Tensor]
    new_graphs: list[int]
    on_their_way: list[int]
    breaks: int


def run_course(way: Way | None, *, before: bool, checkpoints: bool) -> Course:
    """Train compiled (or not) from the second step on, or from before wrapping."""
    torch.manual_seed(0)
    net = Net(checkpoints)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    if way is not None and before:
        way(net, net)
    runs, optimizer = zeroopt.wrap(net, optimizer, bucket_mb=0.004)
    course = Course([], [], [], 0)
    for step, rows in enumerate(SIZES):
        if way is not None and not before and step == 1:
            runs = way(net, runs)  # type: ignore[assignment]
        graphs = count("unique_graphs")
        loss_of(runs(inputs(step, rows, 7))).backward()
        optimizer.step()
        optimizer.zero_grad()
        course.new_graphs.append(count("unique_graphs") - graphs)
        course.on_their_way.append(sum(isinstance(param, ArrivingParameter) for param in net.parameters()))
    course.params = values(net)
    course.breaks = count("graph_break")
    return course


@no_trace_of_compilation()
def run_compiled_and_not(way: Way, *, before: bool, checkpoints: bool) -> tuple[Course, Course]:
    forget_compiled_code()
    plain = run_course(None, before=before, checkpoints=checkpoints)
    assert not count("unique_graphs")
    return plain, run_course(way, before=before, checkpoints=checkpoints)


WAYS: dict[str, tuple[Way, dict[str, bool]]] = {
    "whole": (whole, {}),
    "whole, checkpoints": (whole, {"checkpoints": True}),
    "bare": (bare, {}),
    "in place": (in_place, {}),
    "in place, before wrap": (in_place, {"before": True}),
    "blocks in place": (blocks_in_place, {}),
    "blocks in place, before wrap": (blocks_in_place, {"before": True}),
    "blocks in place, checkpoints": (blocks_in_place, {"checkpoints": True}),
    "blocks replaced": (blocks_replaced, {}),
    "blocks replaced, before wrap": (blocks_replaced, {"before": True}),
    "blocks' forward": (blocks_forward, {}),
    "a layer of torch's": (layer_of_torchs, {}),
    "blocks and whole": (both, {}),
}


@pytest.mark.parametrize("name", WAYS)
def test_parameters_stay_on_their_way_and_nothing_is_compiled_for_that(run_on_ranks: RunOnRanks, name: str) -> None:
    way, options = WAYS[name]
    options = {"before": False, "checkpoints": False} | options
    for plain, compiled in run_on_ranks(2, run_compiled_and_not, way, **options):
        assert all(map(torch.equal, plain.params, compiled.params))
        assert compiled.on_their_way == plain.on_their_way == [len(plain.params)] * len(SIZES)
        assert compiled.breaks == 0
        assert sum(compiled.new_graphs) > 0
        assert compiled.new_graphs[SETTLED:] == [0] * (len(SIZES) - SETTLED)
        assert sum(compiled.new_graphs) == (
            3 if name == "blocks and whole" else 2
        )  # one of them for all sizes but the first


@no_trace_of_compilation()
def run_step_compiled() -> tuple[list[int], list[int], list[int]]:
    """One function that holds all of a training step: new graphs, parameters on their way, and new breaks, by step."""
    forget_compiled_code()
    torch.manual_seed(0)
    net = Net()
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), bucket_mb=0.004)

    @torch.compile(backend=GRAPHS_ONLY)
    def step(x: Tensor) -> None:
        loss_of(model(x)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    new_graphs, on_their_way, new_breaks = [], [], []
    for number in range(5):
        graphs, breaks = count("unique_graphs"), count("graph_break")
        step(inputs(number, 4, 7))
        new_breaks.append(count("graph_break") - breaks)
        new_graphs.append(count("unique_graphs") - graphs)
        on_their_way.append(sum(isinstance(param, ArrivingParameter) for param in net.parameters()))
    return new_graphs, on_their_way, new_breaks


def test_a_compiled_training_step_leaves_parameters_on_their_way(run_on_ranks: RunOnRanks) -> None:
    for new_graphs, on_their_way, new_breaks in run_on_ranks(2, run_step_compiled):
        assert new_graphs[0] > 0 and new_graphs[2:] == [0, 0, 0]
        assert set(on_their_way[1:]) == {len(list(Net().parameters()))}
        # Code is left where zeroopt's own begins. A piece without tensors is broken anew without a new graph.
        assert new_breaks[0] > 0 and new_breaks[2:] == [0, 0, 0]


@no_trace_of_compilation()
def run_compiled_backward(stage: int) -> None:
    """It is refused before anything has been reduced, so training goes on without it."""
    from torch._dynamo import compiled_autograd  # imports half of torch

    expected = train_after(stage, lambda loss: None)

    def backward(loss: Tensor) -> None:
        with (
            pytest.raises(NotSupportedError, match="compiled autograd runs this backward"),
            compiled_autograd._enable(torch.compile(backend=GRAPHS_ONLY)),
        ):
            loss.backward()

    assert all(map(torch.equal, train_after(stage, backward), expected))


def train_after(stage: int, first: Callable[[Tensor], None]) -> list[Tensor]:
    """Do something with a loss, clear gradients, and train."""
    net = build("mlp")
    model, optimizer = zeroopt.wrap(net, sgd(net), stage=stage)
    first(loss_of(model(inputs(0, 4, 7))))
    optimizer.zero_grad()
    train(model, optimizer, range(2))
    return values(net)


@pytest.mark.parametrize("stage", [0, 2])
def test_compiled_autograd_is_refused(run_on_ranks: RunOnRanks, stage: int) -> None:
    run_on_ranks(2, run_compiled_backward, stage)
