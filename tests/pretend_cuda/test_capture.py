"""Forward, backward and step while a CUDA graph is captured: nothing of it touches the host."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from zeroopt.gradients.norms import note_norms

from .process import PretendProcess
from .training import BF16, Loop, Trainer

pytestmark = pytest.mark.slow

LOOPS = {
    "stage 0": Loop({"stage": 0}),
    "stage 1": Loop({"stage": 1}),
    "stage 2": Loop({"stage": 2}),
    "stage 2, accumulated": Loop({"stage": 2}, accumulate=2),
    "stage 2, no_sync": Loop({"stage": 2}, accumulate=2, no_sync=True),
    "stage 2, max_grad_norm": Loop({"stage": 2, "max_grad_norm": 0.1}),
    "stage 2, bfloat16": Loop({"stage": 2, **BF16}),
    "stage 1, 8 bits": Loop({"stage": 1, **BF16, "master_weights": "remainder", "state_dtype": torch.int8}),
}


def _capture(loop: Loop, size: int) -> None:
    from .ranks import Rank, on_ranks
    from .surface import capturing

    def run(rank: Rank) -> Any:
        trainer = Trainer(loop, rank.number, rank.device)
        for _ in range(loop.warm_up):
            trainer.step()
        with rank.recorded(), capturing(rank.device):
            trainer.step()

    on_ranks(size, run)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", LOOPS)
def test_a_step_that_is_captured_leaves_the_host_alone(name: str, size: int, on_pretend_cuda: PretendProcess) -> None:
    on_pretend_cuda(_capture, LOOPS[name], size)


def _look_at_the_host() -> str:
    from .surface import capturing

    with capturing(0):
        try:
            torch.ones(3, device="cuda").sum().item()
        except RuntimeError as error:
            return str(error)
    return "nothing"


def test_what_makes_the_host_wait_is_refused_in_a_capture(on_pretend_cuda: PretendProcess) -> None:
    assert "operation not permitted when stream is capturing" in on_pretend_cuda(_look_at_the_host)


def _wait_across_borders() -> list[str]:
    """What is said to streams that wait for what their capture does not know, or has left."""
    from .surface import capturing

    found = []

    def attempt(wait: Callable[[], object]) -> None:
        try:
            wait()
        except RuntimeError as error:
            found.append(str(error).splitlines()[0])

    outside, fork = torch.cuda.Event(), torch.cuda.Stream()
    outside.record()
    with capturing(0):
        attempt(lambda: torch.cuda.current_stream().wait_event(outside))
        inside = torch.cuda.Event()
        inside.record()
        fork.wait_event(inside)
        found.append(f"a fork is captured: {fork.is_capturing()}")
    attempt(inside.wait)
    attempt(inside.query)
    with capturing(0):
        attempt(inside.wait)
    return found


def test_streams_do_not_wait_across_the_borders_of_a_capture(on_pretend_cuda: PretendProcess) -> None:
    assert on_pretend_cuda(_wait_across_borders) == [
        "dependency created on uncaptured work in another stream",
        "a fork is captured: True",
        *["operation not permitted on an event last recorded in a capturing stream, whose capture is over"],
        "operation not permitted on an event last recorded in a capturing stream",
        *["operation not permitted on an event last recorded in a capturing stream, whose capture is over"],
    ]


def _fork(comes_back: bool) -> str:
    from .ranks import Rank, on_ranks
    from .surface import capturing

    def run(rank: Rank) -> str:
        fork, values = torch.cuda.Stream(), torch.ones(3, device=rank.device)
        try:
            with rank.recorded(), capturing(rank.device):
                fork.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(fork):
                    values += 1
                if comes_back:
                    torch.cuda.current_stream().wait_stream(fork)
        except RuntimeError as error:
            return str(error)
        return ""

    return on_ranks(1, run)[0][0]


def test_a_fork_that_does_not_come_back_is_found(on_pretend_cuda: PretendProcess) -> None:
    assert on_pretend_cuda(_fork, True) == ""
    assert "capturing stream has unjoined work: aten::add" in on_pretend_cuda(_fork, False)


def _capture_in_two_graphs(loop: Loop) -> None:
    """Two whole steps, each in a graph of its own."""
    from .ranks import Rank, on_ranks
    from .surface import capturing

    def run(rank: Rank) -> None:
        trainer = Trainer(loop, rank.number, rank.device)
        for _ in range(loop.warm_up):
            trainer.step()
        for _ in range(2):
            with capturing(rank.device):
                trainer.step()
        trainer.step()

    on_ranks(2, run)


@pytest.mark.parametrize("name", LOOPS)
def test_what_one_graph_has_begun_another_does_not_wait_for(name: str, on_pretend_cuda: PretendProcess) -> None:
    on_pretend_cuda(_capture_in_two_graphs, replace(LOOPS[name], steps=3))


def _capture_without_a_gradient() -> str:
    from torch import nn

    import zeroopt
    from zeroopt.errors import StateError

    from .ranks import Rank, on_ranks
    from .surface import capturing

    def run(rank: Rank) -> str:
        model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).to(rank.device)
        _, optimizer = zeroopt.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), transport="torch")
        inputs = torch.ones(2, 4, device=rank.device)
        for _ in range(2):
            model[1](model[0](inputs)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        try:
            with capturing(rank.device):
                model[0](inputs).sum().backward()
        except StateError as error:
            return str(error)
        return "nothing"

    return on_ranks(2, run)[0][0]


def test_a_parameter_without_a_gradient_is_refused_in_a_capture(on_pretend_cuda: PretendProcess) -> None:
    message = on_pretend_cuda(_capture_without_a_gradient)
    assert "a CUDA graph cannot capture a step in which parameters have no gradient, here 2 of 4" in message


def _capture_with_another_learning_rate() -> str:
    from zeroopt.errors import StateError

    from .ranks import Rank, on_ranks
    from .surface import capturing

    loop = Loop({"stage": 2}, steps=2)

    def run(rank: Rank) -> str:
        trainer = Trainer(loop, rank.number, rank.device)
        for _ in range(loop.warm_up):
            trainer.step()
        trainer.optimizer.param_groups[0]["lr"] *= 0.5
        message = "nothing"
        try:
            with capturing(rank.device):
                trainer.step()
        except StateError as error:
            message = str(error)
        _load(trainer)  # of the capture that has failed there is no graph
        return message

    return on_ranks(2, run)[0][0]


def test_options_that_have_changed_are_refused_in_a_capture(on_pretend_cuda: PretendProcess) -> None:
    message = on_pretend_cuda(_capture_with_another_learning_rate)
    assert "what it would send to the device" in message
    assert "take one more step as it is now, then capture" in message


def _gathers_that_are_left_to_readers() -> tuple[int, int]:
    from torch import nn

    import zeroopt

    from .ranks import Rank, on_ranks
    from .surface import capturing

    def run(rank: Rank) -> tuple[int, int]:
        model = nn.Linear(4, 4).to(rank.device)
        wrapped, optimizer = zeroopt.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), transport="torch")
        inputs = torch.ones(2, 4, device=rank.device)

        def left_by_a_step() -> int:
            wrapped(inputs).sum().backward()
            optimizer.step()
            return len(wrapped.replica.gathers.pending)

        before = left_by_a_step()
        with capturing(rank.device), torch.no_grad():
            wrapped(inputs)
        return before, left_by_a_step()

    return on_ranks(2, run)[0][0]


def test_no_gather_is_left_to_a_graph_that_reads_parameters(on_pretend_cuda: PretendProcess) -> None:
    """A replay waits for none: nobody sees it."""
    before, after = on_pretend_cuda(_gathers_that_are_left_to_readers)
    assert (before, after) == (1, 0)


def _said_to(loop: Loop, captured: Callable[[Trainer], None], after: Callable[[Trainer], None]) -> list[str]:
    """What is said to ranks that capture one thing, and do another thing then."""
    from zeroopt.errors import StateError

    from .ranks import Rank, on_ranks
    from .surface import capturing

    def run(rank: Rank) -> str:
        trainer = Trainer(loop, rank.number, rank.device)
        for _ in range(loop.warm_up):
            trainer.step()
        try:
            with rank.recorded(), capturing(rank.device):
                captured(trainer)
            after(trainer)
        except StateError as error:
            return str(error)
        return ""

    return on_ranks(2, run)[0]


def _update(trainer: Trainer) -> None:
    trainer._update()


def _backward(trainer: Trainer) -> None:
    trainer._backward_passes()


def _nothing(trainer: Trainer) -> None:
    pass


def _step_without_its_backward(loop: Loop) -> tuple[list[str], list[str]]:
    def both(trainer: Trainer) -> None:
        _backward(trainer)
        trainer.optimizer.zero_grad()

    return _said_to(loop, _backward, _update), _said_to(loop, both, Trainer.step)


@pytest.mark.parametrize("name", LOOPS)
def test_a_step_behind_a_captured_backward_is_refused(name: str, on_pretend_cuda: PretendProcess) -> None:
    said, cleared = on_pretend_cuda(_step_without_its_backward, replace(LOOPS[name], steps=2))
    for message in said:
        assert message.startswith("a backward was captured in a CUDA graph, and step() is not captured with it")
    assert cleared == ["", ""]


def _capture_a_step_alone() -> list[str]:
    from zeroopt.errors import StateError

    from .ranks import Rank, on_ranks
    from .surface import capturing

    def run(rank: Rank) -> str:
        trainer = Trainer(Loop({"stage": 2}), rank.number, rank.device)
        for _ in range(2):
            trainer.step()
        trainer._backward_passes()
        try:
            with capturing(rank.device):
                trainer._update()
        except StateError as error:
            return str(error)
        return ""

    return on_ranks(2, run)[0]


def test_a_captured_step_without_its_backward_is_refused(on_pretend_cuda: PretendProcess) -> None:
    for message in on_pretend_cuda(_capture_a_step_alone):
        assert message.startswith("step() is captured in a CUDA graph, and a backward whose gradients it takes is not")


def _capture_behind_eager_passes(no_sync: bool) -> list[str]:
    """What is said to a step that is captured behind an eager backward, whose gradients are cleared by hand, or left by no_sync."""
    from zeroopt.errors import StateError

    from .ranks import Rank, on_ranks
    from .surface import capturing

    def run(rank: Rank) -> str:
        trainer = Trainer(Loop({"stage": 2}, steps=2), rank.number, rank.device)
        for _ in range(2):
            trainer.step()
        with trainer.model.no_sync() if no_sync else nullcontext():
            trainer._backward()
        if not no_sync:
            for param in trainer.model.parameters():
                param.grad = None
        try:
            with capturing(rank.device):
                trainer.step()
        except StateError as error:
            return str(error)
        return ""

    return on_ranks(2, run)[0]


def test_gradients_that_are_cleared_by_hand_are_not_stepped_by(on_pretend_cuda: PretendProcess) -> None:
    assert on_pretend_cuda(_capture_behind_eager_passes, False) == ["", ""]


def test_what_no_sync_has_left_outside_of_the_graph_is_refused(on_pretend_cuda: PretendProcess) -> None:
    for message in on_pretend_cuda(_capture_behind_eager_passes, True):
        assert message.startswith("step() is captured in a CUDA graph, and a backward whose gradients it takes is not")


def _load(trainer: Trainer) -> None:
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())


def _load_after_capture() -> tuple[list[str], list[str]]:
    loop = Loop({"stage": 2}, steps=2)
    return _said_to(loop, Trainer.step, _load), _said_to(loop, _nothing, _load)


def test_state_that_a_graph_steps_by_is_not_replaced(on_pretend_cuda: PretendProcess) -> None:
    said, not_captured = on_pretend_cuda(_load_after_capture)
    for message in said:
        assert message.startswith(
            "load_state_dict() would replace the optimizer's state: a CUDA graph of a step has been captured"
        )
    assert not_captured == ["", ""]


def _tables_of_a_graph() -> list[tuple[bool, bool]]:
    """Whether the table of squares was replaced after a capture, and whether that of the graph is still there."""
    import gc
    import weakref

    from .ranks import Rank, on_ranks
    from .surface import capturing

    def run(rank: Rank) -> tuple[bool, bool]:
        loop = Loop({"stage": 2, "max_grad_norm": 0.1}, steps=3)
        trainer = Trainer(loop, rank.number, rank.device)
        for _ in range(loop.warm_up):
            trainer.step()
        with capturing(rank.device):
            trainer.step()
        stores = trainer.optimizer._trained.stores
        first = next(store for store in stores if store.squares is not None)
        rows = weakref.ref(first.squares._table.rows)
        table = weakref.ref(first.squares)
        for store in stores[:-1]:
            store.norm = None
        note_norms([store for store in stores if store is not stores[-1]], 2.0)  # of fewer buckets
        gc.collect()
        is_replaced = first.squares is not table()
        return is_replaced, table() is not None and rows() is not None

    return on_ranks(2, run)[0]


def test_a_table_that_a_graph_reads_stays_when_another_takes_its_place(on_pretend_cuda: PretendProcess) -> None:
    assert on_pretend_cuda(_tables_of_a_graph) == [(True, True)] * 2


def _gradients_elsewhere() -> list[str]:
    """What a fused optimizer says whose gradients lie elsewhere when it is captured, and whether a graph's rows stay when they move."""
    import gc
    import weakref

    import zeroopt
    from zeroopt.errors import StateError

    from .surface import capturing

    param = torch.nn.Parameter(torch.ones(8, device="cuda"))
    optimizer = zeroopt.optim.FusedAdamW([param], lr=0.1)
    grads = [torch.ones(8, device="cuda") for _ in range(2)]

    def step(grad: Tensor) -> None:
        param.grad = grad
        optimizer.step()

    found = []
    step(grads[0])
    try:
        with capturing():
            step(grads[1])
    except StateError as error:
        found.append(str(error))
    step(grads[1])
    tables = [
        each
        for each in gc.get_objects()
        if type(each) is zeroopt.ops.SegmentTable and each.segments[0].param.data_ptr() == param.data_ptr()
    ]
    found.append(f"behind it the device knows where they lie: {[torch.equal(t.rows.cpu(), t._host) for t in tables]}")
    with capturing():
        step(grads[1])
    rows = [weakref.ref(table.rows) for table in tables]
    del tables
    step(grads[0])
    gc.collect()
    found.append(f"{len(rows)} tables, of a graph that can be replayed: {all(each() is not None for each in rows)}")
    return found


def test_a_table_that_would_change_in_a_capture_is_refused(on_pretend_cuda: PretendProcess) -> None:
    refused, taken, kept = on_pretend_cuda(_gradients_elsewhere)
    assert (
        "or where they lie) has changed since the last step: take one more step as it is now, then capture" in refused
    )
    assert taken == "behind it the device knows where they lie: [True]"
    assert kept == "1 tables, of a graph that can be replayed: True"
