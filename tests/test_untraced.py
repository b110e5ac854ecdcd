"""An untraced function is run by compiled code as it stands, and is itself in all other ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from worker_pool import RunOnRanks

from zeroopt.untraced import untraced, untraced_hook


class Taker:
    """Has a method that cannot be traced as it should be: it depends on whether it is."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, type]] = []

    def look(self, x: Tensor) -> Tensor:
        self.seen.append((torch.compiler.is_compiling(), type(x)))
        return x + 1

    @untraced
    def untraced_look(self, x: Tensor) -> Tensor:
        """Says what it does."""
        return self.look(x)

    @untraced_hook
    def untraced_hook(self, x: Tensor) -> Tensor:
        """Has the gradient be one more."""
        return self.look(x)


def look_in_compiled_code() -> tuple[list[tuple[bool, type]], list[float], int]:
    """What the methods see, what comes of them, and how many graphs there are around the untraced one."""
    taker, graphs = Taker(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend)
    def step(x: Tensor) -> Tensor:
        return taker.untraced_look(x * 2) * 3

    result = step(torch.tensor([1.0]))
    return taker.seen, result.tolist(), len(graphs)


def test_compiled_code_is_left_and_entered_again(run_on_ranks: RunOnRanks) -> None:
    """On a worker, for in this process nothing is compiled."""
    ((seen, result, num_graphs),) = run_on_ranks(1, look_in_compiled_code)
    assert seen == [(False, Tensor)] and result == [9.0] and num_graphs == 2


def look_in_compiled_backward() -> tuple[list[tuple[bool, type]], list[float], int]:
    """What a hook sees, the gradient, and how many graphs there are: the one before the backward."""
    taker, graphs = Taker(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend)
    def step(loss: Tensor) -> None:
        (loss * 2).backward()

    param = torch.tensor([1.0], requires_grad=True)
    for _ in range(2):
        seen = param * 3
        seen.register_hook(taker.untraced_hook)
        step(seen.sum())
    assert param.grad is not None
    return taker.seen, param.grad.tolist(), len(graphs)


def test_hooks_in_a_compiled_backward_run_as_they_stand(run_on_ranks: RunOnRanks) -> None:
    ((seen, gradient, num_graphs),) = run_on_ranks(1, look_in_compiled_backward)
    assert seen == [(False, Tensor)] * 2 and gradient == [18.0] and num_graphs == 1


def test_arguments_results_and_errors_pass() -> None:
    @untraced
    def divide(a: int, *, by: int) -> float:
        """Says what it does."""
        return a / by

    assert divide(3, by=2) == 1.5
    assert divide.__name__ == "divide" and divide.__doc__ == "Says what it does."
    with pytest.raises(ZeroDivisionError):
        divide(1, by=0)
