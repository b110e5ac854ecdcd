"""What ranks hold, wrapping and the first steps included, on models that zeroopt was not made for: the formula and little more.

Ranks are ordinary processes: nothing is rehearsed, and nothing is asked of the allocator. What activations, libraries and the
gradient that autograd is making take is measured by plain SGD on the same model, without communication and with gradients that
stay where they are. `python -m bench.memory` measures the same on larger models.

A look at the ranks may miss a peak where the machine is busy, and cannot make one up; what SGD holds is told by the kernel, which
misses nothing. So a test that fails has found something.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch

from bench.compare.formula import MOMENT_BYTES
from bench.launch import die_with_parent
from bench.memory.measure import Measured, measure
from bench.memory.methods import METHODS
from bench.memory.rank import Case

pytestmark = pytest.mark.slow

Measure = Callable[[Case], Measured]

INTERVAL_S = 0.04  # looking takes the time of those who are looked at
STEPS = 3
STEPS_ALONE = range(5, 15)  # of runs of SGD: where the C heap has its holes differs from one to the next
ALLOWED = 0.5  # bytes a parameter: the gradient pool, staging and scratch
BUILT = 4.0  # bytes a parameter of what is wrapped, whatever it becomes
ALONE = {"float32": "SGD alone", "bfloat16": "SGD alone, bfloat16"}


@pytest.fixture(scope="module")
def measured() -> Iterator[Measure]:
    """`measure`, each case once, from a process of its own: its ranks are forked from a server that has imported what they need."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=end_with_parent) as process:

        @cache
        def once(case: Case) -> Measured:
            row = process.submit(measure, case, INTERVAL_S).result()
            assert row.problem is None, row.problem
            return row

        yield once


def end_with_parent() -> None:
    threading.Thread(target=die_with_parent, daemon=True).start()


def case(model: str, method: str, world_size: int = 2, loop: str = "plain", *, after_load: bool = False) -> Any:
    load = ", after a load" if after_load else ""
    row = Case(model, method, world_size, loop, after_load, STEPS)
    return pytest.param(row, id=f"{model}, {method}, {world_size} ranks, {loop}{load}")


CASES = [
    case("bert-small", "stage 1", 4),
    case("vit-small", "stage 0"),
    case("gpt2-small", "stage 2"),
    case("t5-small", "stage 2"),
    case("mixture-small", "stage 2"),
    case("gpt-small-shuffled", "everything", 4),
]


@pytest.mark.parametrize("row", CASES)
def test_ranks_hold_the_formula_and_little_more(measured: Measure, row: Case) -> None:
    if (problem := row.why_not()) is not None:
        pytest.skip(problem)
    ranks = measured(row)
    formula = ranks.formula
    beyond = beyond_formula_alone(measured, row, enough=ranks.a_parameter(ranks.peak) - formula - ALLOWED)
    held = {phase: ranks.a_parameter(most) for phase, most in ranks.peaks.items()}
    print(f"{formula:.2f} by formula, {beyond:.2f} beyond:", {phase: f"{most:.2f}" for phase, most in held.items()})
    assert held.get("wrap", 0.0) <= max(BUILT, formula - moments(row)) + ALLOWED
    assert 0.99 * formula <= ranks.a_parameter(ranks.peak) <= max(BUILT, formula + beyond) + ALLOWED


def beyond_formula_alone(measured: Measure, row: Case, enough: float) -> float:
    """Bytes a parameter that SGD alone was seen to hold beyond parameters and gradients: the most of so many runs as show `enough`, or
    of all. Of bert-small they show 4.7, 5.6 or 6.4, each about as often."""
    most = 0.0
    for steps in STEPS_ALONE:
        run = measured(Case(row.model, ALONE[row.precision], 1, "gradients set to zero", steps=steps))
        most = max(most, run.a_parameter(run.own_peak) - run.formula)
        if most >= enough:
            break
    return most


def moments(row: Case) -> float:
    """Bytes a parameter of AdamW's moments, which the first step makes."""
    options = METHODS[row.method].options
    assert options is not None
    state_dtype = options.get("state_dtype", torch.float32)
    return 2 * MOMENT_BYTES[state_dtype] / (row.world_size if options["stage"] else 1)
