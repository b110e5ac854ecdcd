"""Who waits in front of compiled code, for what, and what becomes of code that nobody has seen coming; on a rank alone, on which nothing
else is compiled."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch
from lone_slice import LoneSlice, buckets_of, params_of, values
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from worker_pool import RunOnRanks, forget_compiled_code

from zeroopt.collectives import PendingCollective
from zeroopt.collectives.pending import Done
from zeroopt.parameters.arriving import ArrivingParameter
from zeroopt.parameters.compiled import CompiledCall, callees_compiler, watch_compiler
from zeroopt.parameters.gathers import ParamGathers
from zeroopt.plan.params import ManagedParam


class Gather(PendingCollective):
    """Notes when it is waited for."""

    def __init__(self, label: str, waited: list[str]) -> None:
        self._label, self._waited = label, waited

    def finish(self) -> None:
        self._waited.append(self._label)


class Slow(LoneSlice):
    """Gathers that come when they are waited for.

    Attributes:
        waited: the labels of those that have been, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def start_all_gather(self, full: Tensor, *, label: str = "a bucket") -> PendingCollective:
        return Gather(label, self.waited)


class Layer(nn.Module):
    """A matrix in a bucket of its own, and a note of what has been waited for when the layer runs as it stands."""

    def __init__(self, managed: ManagedParam) -> None:
        super().__init__()
        self.weight = managed.param

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Pair(nn.Module):
    def __init__(self, *params: ManagedParam) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, params))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    """Two pairs of layers, and between them something that is not compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.params = params_of(*(values((4, 4), seed) for seed in range(4)))
        self.first, self.second = Pair(*self.params[:2]), Pair(*self.params[2:])
        self.between: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.between()
        return self.second(x)


class Training:
    """A model whose buckets are gathered as after a step."""

    def __init__(self, prepare: Callable[[Model], None] = lambda _: None) -> None:
        forget_compiled_code()
        self.model, self.transport = Model(), Slow()
        prepare(self.model)
        self.gathers = ParamGathers(self.model, self.transport, lazy=True)
        self.buckets = buckets_of(self.model.params, self.transport, bucket_bytes=64)
        self.gathers.extend(self.buckets)

    def step(self) -> bool:
        """Whether parameters are left to their readers."""
        self.transport.waited.clear()
        for bucket in self.buckets:
            self.gathers.start(bucket, Done())
        self.gathers.leave_to_readers()
        return all(isinstance(managed.param, ArrivingParameter) for managed in self.model.params)

    def labels(self, *numbers: int) -> set[str]:
        """Of the buckets of these parameters."""
        params = [self.model.params[number].param for number in numbers]
        return {bucket.name for bucket in self.buckets if any(bucket.params[0].param is param for param in params)}


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compile_in_place(model: Model) -> None:
    for part in (model.first, model.second):
        part.compile(backend="eager", fullgraph=True)


def compile_forwards(model: Model) -> None:
    for part in (model.first, model.second):
        part.forward = torch.compile(part.forward, backend="eager", fullgraph=True)  # type: ignore[method-assign]


def replace(model: Model) -> None:
    for name in ("first", "second"):
        setattr(model, name, torch.compile(getattr(model, name), backend="eager", fullgraph=True))


def wait_by_part(prepare: Callable[[Model], None], late: bool) -> None:
    training = Training() if late else Training(prepare)
    model, x, seen = training.model, torch.ones(2, 4), []
    model.between = lambda: seen.append(set(training.transport.waited))
    if late:
        assert training.step()
        prepare(model)
    for _ in range(3):
        model(x)
        assert training.step()
    seen.clear()
    graphs = num_graphs()
    model(x)
    assert seen == [training.labels(0, 1)]
    assert set(training.transport.waited) == training.labels(0, 1, 2, 3)
    assert num_graphs() == graphs > 0
    forget_compiled_code()


def test_each_compiled_part_waits_for_its_own_parameters(run_on_ranks: RunOnRanks) -> None:
    for prepare in (compile_in_place, compile_forwards, replace):
        for late in (False, True):
            run_on_ranks(1, wait_by_part, prepare, late)


def compile_function(reads: bool) -> tuple[list[int], list[bool]]:
    """Call a compiled function between a step and the forward, with parameters or without."""
    training = Training()
    weights = [managed.param for managed in training.model.params] if reads else [torch.ones(4, 4)] * 4
    penalty = torch.compile(lambda weights: sum(w.square().sum() for w in weights), backend="eager", fullgraph=True)
    new_graphs, left = [], []
    for _ in range(6):
        graphs = num_graphs()
        left.append(training.step())
        assert torch.equal(penalty(weights), sum(w.square().sum() for w in weights))
        training.model(torch.ones(2, 4))
        new_graphs.append(num_graphs() - graphs)
    forget_compiled_code()
    return new_graphs, left


def test_a_function_that_is_given_parameters_has_the_step_wait(run_on_ranks: RunOnRanks) -> None:
    """Its guards see the class of parameters on their way, and nobody is told before it is called."""
    assert run_on_ranks(1, compile_function, True) == [([1, 1, 1, 0, 0, 0], [True, True, True, False, False, False])]


def test_a_function_that_is_given_none_has_not(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(1, compile_function, False) == [([1, 0, 0, 0, 0, 0], [True] * 6)]


def change_shapes() -> tuple[int, bool]:
    """Parts that are compiled again and again while later ones are on their way, for reasons of their own."""
    training = Training(compile_in_place)
    for part in (training.model.first, training.model.second):
        part.compile(backend="eager", dynamic=False)
    for rows in range(2, 5):
        training.step()
        training.model(torch.ones(rows, 4))
    graphs, left = num_graphs(), training.step()
    forget_compiled_code()
    return graphs, left


def test_what_is_compiled_again_behind_a_wait_does_not_count(run_on_ranks: RunOnRanks) -> None:
    # The second part takes what requires a gradient, so each shape is compiled twice.
    assert run_on_ranks(1, change_shapes) == [(6, True)]


class Refusal(PendingCollective):
    def finish(self) -> None:
        raise RuntimeError("too early")


def compile_while_closed() -> set[str]:
    """Something is compiled while a backward runs that steps its buckets."""
    training = Training()
    training.gathers.close(training.buckets[0], Refusal())
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    waited = set(training.transport.waited)
    forget_compiled_code()
    return waited


def test_the_compiler_does_not_wait_for_what_is_not_under_way(run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(1, compile_while_closed) == [set()]


class Told:
    """Notes what it is told of the compiler."""

    def __init__(self) -> None:
        self.again: list[bool] = []

    def compiler_starts(self, function: str, *, again: bool) -> None:
        self.again.append(again)


def watch_through_a_reset() -> tuple[list[bool], list[bool]]:
    """Told of one function that is compiled, which has asked for it twice: before a reset, and after it."""
    import torch._dynamo  # imports half of torch

    forget_compiled_code()
    told, heard = Told(), []
    for _ in range(2):
        watch_compiler(told)
        watch_compiler(told)
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
        heard.append(told.again)
        told.again = []
        torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    forget_compiled_code()
    assert not told.again
    return heard[0], heard[1]


def test_a_watcher_is_told_once_of_each_compilation(run_on_ranks: RunOnRanks) -> None:
    (told,) = run_on_ranks(1, watch_through_a_reset)
    assert [len(each) for each in told] == [1, 1] and not told[0][0]


class Calls:
    """A compiled call, and what came before it."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def compiled(self, x: int) -> int:
        self.events.append(x)
        return x + 1

    def before(self) -> None:
        self.events.append("before")


def test_something_comes_before_a_compiled_call() -> None:
    calls = Calls()
    call = CompiledCall(calls.compiled, calls.before)
    assert call(3) == 4
    assert calls.events == ["before", 3]


def copy_and_unhook() -> None:
    training = Training(compile_in_place)
    model = training.model
    assert isinstance(model.first._compiled_call_impl, CompiledCall)
    code = model.first._compiled_call_impl.compiled
    for twin in (copy.deepcopy(model.first), pickle.loads(pickle.dumps(model.first))):
        assert twin._compiled_call_impl is None
        assert torch.equal(twin(torch.ones(2, 4)), model.first(torch.ones(2, 4)))
    training.gathers.remove_hooks()
    assert model.first._compiled_call_impl is code
    assert not any(module._forward_pre_hooks for module in model.modules())
    forget_compiled_code()


def test_nothing_of_it_is_copied_or_left(run_on_ranks: RunOnRanks) -> None:
    run_on_ranks(1, copy_and_unhook)


def test_asking_whether_frames_are_compiled_costs_torch_no_reference() -> None:
    """Torch 2.6 tells what it does not own: each question freed its function a little more, and torch.compile crashed."""

    def compiler(*args: object) -> None:
        return None

    kept = [compiler] * 1000  # it is not freed, whatever comes
    before = eval_frame.set_eval_frame(compiler)
    try:
        count = sys.getrefcount(compiler)
        for _ in range(100):
            callees_compiler()
        left = sys.getrefcount(compiler)
    finally:
        eval_frame.set_eval_frame(before)
    assert left == count and len(kept) == 1000
