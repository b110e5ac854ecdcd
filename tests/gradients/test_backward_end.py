"""When the outermost backward is through."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zeroopt.gradients.backward_end import BackwardEnd


def watched() -> tuple[nn.Sequential, list[Any], list[BackwardEnd]]:
    """Three layers, what happens in a backward of them, and who waits for its end, since the first gradient."""
    layers = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    seen: list[Any] = []
    waiting: list[BackwardEnd] = []

    def ended() -> None:
        waiting.clear()
        seen.append("end")

    def note(number: int) -> None:
        if not waiting:
            waiting.append(BackwardEnd(ended, lambda: seen.append("within")))
        seen.append(number)

    for number, layer in enumerate(layers):
        layer.weight.register_post_accumulate_grad_hook(lambda _, number=number: note(number))  # type: ignore[no-untyped-call]
    return layers, seen, waiting


def run_again(layers: nn.Sequential, *, nested: bool = False) -> Tensor:
    """Each layer in a checkpoint of its own, and all in one more."""

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return x

    x = torch.ones(1, 2, requires_grad=True)
    result: Tensor = checkpoint(run, x, use_reentrant=True) if nested else run(x)
    return result.sum()


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_backward_passes_within_another_end_with_it() -> None:
    layers, seen, _ = watched()
    for _ in range(2):
        run_again(layers).backward()
        assert seen == [2, "within", 1, 0, "end"]
        seen.clear()
        run_again(layers, nested=True).backward()
        assert seen == [2, "within", 1, 0, "within", "end"]
        seen.clear()


def test_a_plain_backward_has_one_end() -> None:
    layers, seen, _ = watched()
    layers(torch.ones(1, 2)).sum().backward()
    assert seen == [2, 1, 0, "end"]


def test_what_has_raised_ends_no_later_backward() -> None:
    layers, seen, waiting = watched()
    handle = layers[1].weight.register_hook(lambda _: 1 / 0)
    loss = run_again(layers)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    waiting.pop().forget()
    seen.clear()
    run_again(layers).backward()
    assert seen == [2, "within", 1, 0, "end"]


def test_without_anything_behind_the_inner_end_counts() -> None:
    layers, seen, _ = watched()
    leaf = torch.ones(1, requires_grad=True)

    @torch.enable_grad()
    def run_another(_: Tensor) -> None:
        layers(torch.ones(1, 2)).sum().backward()

    leaf.register_post_accumulate_grad_hook(run_another)  # type: ignore[no-untyped-call]
    leaf.sum().backward()
    assert seen == [2, 1, 0, "end"]


def test_it_tells_apart_what_runs_within_it() -> None:
    head, layers = nn.Linear(2, 2, bias=False), nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
    waiting: list[BackwardEnd] = []
    within: list[bool] = []

    def note(_: Tensor) -> None:
        if not waiting:
            waiting.append(BackwardEnd(waiting.clear))
        within.append(waiting[0].runs_within())

    for layer in (head, *layers):
        layer.weight.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
    x = checkpoint(layers[0], torch.ones(1, 2, requires_grad=True), use_reentrant=True)
    head(checkpoint(layers[1], layers[0](x), use_reentrant=True)).sum().backward()
    assert within == [False, True, False, True] and not waiting  # the head, layer 1, layer 0 plainly and in its segment


def test_autograd_drops_it_where_the_backward_raises() -> None:
    layers, _, _ = watched()
    kept: list[weakref.ref[BackwardEnd]] = []
    layers[2].weight.register_hook(lambda _: kept.append(weakref.ref(BackwardEnd(lambda: None))))
    layers[1].weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_again(layers).backward()
    assert kept[0]() is None
