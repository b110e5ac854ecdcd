"""An optimizer is tried out on other tensors by a copy that does what it would do, and stays as it is."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import torch
from torch import nn
from worker_pool import RunOnRanks

from zeroopt.errors import NotSupportedError
from zeroopt.probing.probe import Trial, is_per_element, is_torchs_own, step_without_hooks, try_out

ALONE = [[torch.tensor([1.0, 2.0])]]
GRADS = [[torch.tensor([0.5, -1.0])], [torch.tensor([0.25, 4.0])]]
PROBE_LR = 0.01  # of trials, whatever the optimizer has


def params(*numels: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(numel)) for numel in numels]


class Counting(torch.optim.Optimizer):
    """Counts its steps in an option, an attribute or its state, and is another rule from some step on."""

    def __init__(self, of: Iterable[Any], where: str, begin: int = 0, last: int | None = None) -> None:
        super().__init__(of, {"lr": 1.0, "k": 0, "begin": begin, "last": last})
        self.where, self.calls, self.seen = where, 0, [0]

    def count(self, group: dict[str, Any], param: nn.Parameter) -> int:
        self.calls += 1
        self.seen[0] += 1
        if self.where == "option":
            group["k"] += 1
            return int(group["k"])
        if self.where == "attribute":
            return self.calls
        inner = self.state[param].setdefault("inner", {"k": torch.zeros(())})
        inner["k"] += 1
        return int(inner["k"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                count = self.count(group, param)
                if group["last"] is not None and count > group["last"]:
                    raise RuntimeError("no schedule is that long")
                param.sub_(param.grad if count >= group["begin"] else torch.ones_like(param))


class Draws(torch.optim.SGD):
    """Adds a random number to gradients."""

    draw: Callable[[], float]

    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            param.grad += self.draw()
        return super().step(closure)


class Talks(torch.optim.SGD):
    """Would wait for other ranks."""

    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            torch.ops._c10d_functional.all_reduce(param.grad, "sum", "nobody")
        return super().step(closure)


class Uncopyable:
    """A hook that holds something of which there is but one."""

    def __call__(self, *_: object) -> None:
        pass

    def __deepcopy__(self, memo: object) -> Uncopyable:
        raise TypeError("cannot be copied")


class NeedsItsState(torch.optim.Optimizer):
    """Makes its state in the constructor and counts on it."""

    def __init__(self, of: Iterable[Any]) -> None:
        super().__init__(of, {"lr": 0.1})
        for param in self.param_groups[0]["params"]:
            self.state[param] = {"sum": torch.full_like(param, 0.5), "names": ["a"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            param.sub_(self.state[param]["sum"].add_(1))


def tried(optimizer: torch.optim.Optimizer, group: int = 0, **options: Any) -> Trial:
    return try_out(optimizer, group, ALONE, GRADS, **options)


def test_a_trial_takes_the_steps_that_the_rule_takes() -> None:
    optimizer = torch.optim.SGD(params(5), lr=0.1, momentum=0.5)
    (outcome,) = tried(optimizer).outcomes
    first, second = (grads[0] for grads in GRADS)
    change = -PROBE_LR * (first + (0.5 * first + second))
    torch.testing.assert_close(outcome.changes, [change])
    assert torch.equal(outcome.starts[0], ALONE[0][0])
    assert torch.equal(outcome.states[0]["momentum_buffer",], 0.5 * first + second)
    assert outcome.numbers["option", "momentum"] == 0.5


def test_the_optimizer_and_what_it_is_tried_on_stay_as_they_are() -> None:
    own = params(3, 4)
    optimizer = torch.optim.AdamW(own, lr=0.1)
    for param in own:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = copy.deepcopy((optimizer.state_dict(), own))
    starts, grads = copy.deepcopy((ALONE, GRADS))
    try_out(optimizer, 0, starts, grads, later_steps=2)
    assert str((optimizer.state_dict(), own)) == str(before)
    assert str((starts, grads)) == str((ALONE, GRADS))
    assert all(torch.equal(param.grad, torch.ones_like(param)) for param in own if param.grad is not None)


def test_the_options_are_those_of_the_group_but_for_the_rate() -> None:
    groups = [{"params": params(2), "momentum": 0.25}, {"params": params(2), "momentum": 0.75, "lr": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for group, momentum in enumerate((0.25, 0.75)):
        trial = tried(optimizer, group)
        assert trial.outcomes[0].numbers["option", "momentum"] == momentum
        assert trial.outcomes[0].numbers["option", "lr"] == PROBE_LR
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_tensors_may_be_in_several_groups() -> None:
    trial = try_out(
        torch.optim.SGD(params(1), lr=0.1), 0, [ALONE[0], [torch.zeros(())]], [[GRADS[0][0], torch.ones(())]]
    )
    assert [len(group["params"]) for group in trial.probe.param_groups] == [1, 1]
    assert [change.shape for change in trial.outcomes[0].changes] == [(2,), ()]
    assert trial.outcomes[0].changes[1] == pytest.approx(-PROBE_LR)


@pytest.mark.parametrize("where", ["option", "attribute", "state"])
def test_later_steps_come_where_counters_are_far_ahead(where: str) -> None:
    grads = [[torch.full((2,), 2.0)]] * 2
    optimizer = Counting(params(2), where, begin=500)
    trial = try_out(optimizer, 0, ALONE, grads, later_steps=2)
    assert [change.tolist() for outcome in trial.outcomes for change in outcome.changes] == [[-2.0] * 2] + [
        [-4.0] * 2
    ] * 2
    if where == "option":
        assert [outcome.numbers["option", "k"] for outcome in trial.outcomes] == [2, 1000, 5_040_000]
    assert optimizer.calls == 0 and optimizer.param_groups[0]["k"] == 0


def test_without_later_steps_there_is_one_outcome() -> None:
    assert len(tried(Counting(params(2), "option")).outcomes) == 1


def test_who_cannot_count_so_far_has_fewer_outcomes() -> None:
    assert len(tried(Counting(params(2), "option", last=1000), later_steps=2).outcomes) == 2
    with pytest.raises(RuntimeError, match="no schedule is that long"):
        tried(Counting(params(2), "option", last=1), later_steps=2)


def test_attributes_are_copied_and_parameters_in_them_are_not() -> None:
    own = params(2)
    optimizer: Any = Counting(own, "attribute")
    optimizer.first = own[0]
    probe: Any = tried(optimizer).probe
    assert optimizer.seen == [0] and probe.seen == [2]
    assert probe.first is own[0]


def test_options_that_a_step_reads_are_noted() -> None:
    optimizer = Counting([{"params": params(2), "name": "unused"}], "option")
    reads = tried(optimizer).reads
    assert {"lr", "name"}.isdisjoint(reads) and {"k", "begin", "last", "params"} <= reads


@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), random.random], ids=["torch", "python"])
def test_random_numbers_are_those_of_the_seed_and_go_on_as_if_none_had_been_drawn(draw: Callable[[], float]) -> None:
    before = torch.get_rng_state(), random.getstate()
    optimizer = Draws(params(2), lr=0.1)
    optimizer.draw = draw
    first, second, other = (tried(optimizer, seed=seed).outcomes[0].changes[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert torch.equal(first, second) and not torch.equal(first, other)
    draw()
    assert torch.equal(tried(optimizer, seed=1).outcomes[0].changes[0], first)


def test_random_numbers_go_on_after_an_error_too() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        tried(Counting(params(2), "option", last=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_who_is_watched_may_not_communicate() -> None:
    with pytest.raises(NotSupportedError, match="its step communicates with other ranks"):
        tried(Talks(params(2), lr=0.1), watched=True)
    assert len(tried(torch.optim.SGD(params(2), lr=0.1), watched=True).outcomes) == 1


def test_state_from_the_constructor_is_taken_along_where_it_is_needed() -> None:
    optimizer = NeedsItsState(params(3))
    trial = tried(optimizer)
    assert trial.with_state
    assert trial.outcomes[0].changes[0].tolist() == [-(1.5 + 2.5)] * 2
    assert trial.outcomes[0].states[0]["names", 0] == "a"
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["sum"].tolist() == [0.5] * 3


def test_state_is_left_where_the_rule_makes_its_own() -> None:
    optimizer = torch.optim.SGD(params(3), lr=0.1, momentum=0.5)
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(3)
    optimizer.step()
    trial = tried(optimizer)
    assert not trial.with_state
    assert torch.equal(trial.outcomes[0].states[0]["momentum_buffer",], 0.5 * GRADS[0][0] + GRADS[1][0])


def test_hooks_and_schedulers_belong_to_real_steps() -> None:
    optimizer = torch.optim.SGD(params(2), lr=0.1)
    heard: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: heard.append("before"))
    optimizer.register_step_post_hook(lambda *_: heard.append("after"))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer.register_step_post_hook(Uncopyable())
    tried(optimizer)
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.ones(2)
    step_without_hooks(optimizer)
    assert heard == [] and param.tolist() == pytest.approx([0.9, 0.9])
    optimizer.step()
    assert heard == ["before", "after"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("exp_avg", torch.zeros(2, 3), True),
        ("row", torch.zeros(2), False),
        ("step", torch.zeros(()), False),
        ("count", 3, False),
        ("flat", torch.zeros(6), False),
    ],
)
def test_state_of_the_parameters_shape_is_of_its_elements(name: str, value: Any, expected: bool) -> None:
    assert is_per_element(name, value, torch.zeros(2, 3)) is expected


def test_the_step_count_of_a_scalar_is_no_moment() -> None:
    scalar = torch.zeros(())
    assert is_per_element("exp_avg", scalar, scalar) and not is_per_element("step", scalar, scalar)


def test_attributes_that_all_optimizers_have_are_torchs_own() -> None:
    optimizer = torch.optim.SGD(params(1), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer.step()
    own = {name for name in vars(optimizer) if not is_torchs_own(name)}
    assert own <= {"step", "_zero_grad_profile_name", "_warned_capturable_if_run_uncaptured"}, own
    assert not is_torchs_own("moments")


def descend(param: torch.Tensor, grad: torch.Tensor, lr: float) -> None:
    param.sub_(grad * lr)


class Compiled(torch.optim.SGD):
    """Compiles its step when it first takes one."""

    def __init__(self, of: Iterable[Any]) -> None:
        super().__init__(of, lr=1.0)
        self.graphs: list[torch.fx.GraphModule] = []

    def step(self, closure: Any = None) -> None:
        update = torch.compile(descend, fullgraph=True, backend=self.note)
        for param in self.param_groups[0]["params"]:
            update(param.detach(), param.grad, self.param_groups[0]["lr"])

    def note(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward


def try_a_compiled_step() -> tuple[list[float], int, list[float], int]:
    """What a trial changes, how often it compiles, and the same for a real step after it."""
    optimizer = Compiled(params(2))
    trial = try_out(optimizer, 0, ALONE, GRADS, watched=True)
    in_trial = len(cast(Compiled, trial.probe).graphs)
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(2)
    optimizer.step()
    return trial.outcomes[0].changes[0].tolist(), in_trial, param.tolist(), len(optimizer.graphs)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6 compiles in a trial, too")
def test_a_compiled_step_is_tried_as_it_was_written_and_compiled_afterwards(run_on_ranks: RunOnRanks) -> None:
    """On a worker, for in this process nothing is compiled."""
    ((changes, in_trial, param, graphs),) = run_on_ranks(1, try_a_compiled_step)
    assert changes == pytest.approx([-0.0075, -0.03]) and in_trial == 0
    assert param == [0.0, 0.0] and graphs == 1
