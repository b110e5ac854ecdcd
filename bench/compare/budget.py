"""The largest model that trains in so many bytes a rank, found by trying numbers of layers, each guessed from those before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from bench.compare.launch import run_method
from bench.compare.methods import DDP, METHODS
from bench.compare.rank import Job
from bench.compare.setting import Setting
from bench.compare.summary import row_of

MANY_RANKS = (64, 1024)


@dataclass(frozen=True)
class Largest:
    """What one method can train.

    Attributes:
        problem: why it could not be found out; None where it could.
        layers: 0 where not even one fits.
        tried: bytes a rank by number of layers.
        formula: bytes a parameter, by number of ranks.
    """

    method: str
    problem: str | None
    layers: int
    parameters: int
    tried: dict[int, float]
    formula: dict[int, float]


@dataclass(frozen=True)
class Search:
    """What all methods can train in one setting, whose number of layers means nothing.

    Attributes:
        budget_mb: millions of bytes a rank, beyond what the rehearsal has left.
    """

    setting: Setting
    budget_mb: float
    found: list[Largest]

    @property
    def baseline(self) -> Largest | None:
        """DDP's, where it can train anything."""
        return next((largest for largest in self.found if largest.method == DDP and largest.parameters), None)

    @property
    def failed(self) -> bool:
        """A method that could have run has not."""
        return any(largest.problem and not METHODS[largest.method].why_not(self.setting) for largest in self.found)


def search(
    setting: Setting, methods: Sequence[str], budget_mb: float, interval_s: float, timeout_s: float, console: Console
) -> Search:
    """One method after the other. A model fits when the ranks, training it, held no more than that together, by their number."""

    def measure(method: str, setting: Setting) -> float:
        held = measured_bytes(method, setting, interval_s, timeout_s)
        text = f"{method}, {setting.world_size} ranks, {setting.layers} layers: {held / 1e6:.1f} MB"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return held

    return Search(setting, budget_mb, [find_largest(method, setting, budget_mb * 1e6, measure) for method in methods])


class NoFigures(Exception):
    """A run has failed; its text says why."""


def measured_bytes(method: str, setting: Setting, interval_s: float, timeout_s: float) -> float:
    """Of a rank at the peak, of device memory where there is any."""
    row = row_of([run_method(Job(method, setting, steps=0, timeline=False), interval_s, timeout_s)])
    held = row.pss_bytes if row.device_bytes is None else row.device_bytes
    if held is None:
        raise NoFigures(row.problem)
    return held


def find_largest(method: str, setting: Setting, budget: float, measure: Callable[[str, Setting], float]) -> Largest:
    """By trying `setting.layers`, up to four times as many as the formula lets expect.

    Args:
        measure: bytes a rank; raises `NoFigures`.
    """
    formula = {n: METHODS[method].formula(replace(setting, world_size=n)) for n in (setting.world_size, *MANY_RANKS)}
    tried: dict[int, float] = {}

    def held(layers: int) -> float:
        tried[layers] = measure(method, replace(setting, layers=layers))
        return tried[layers]

    try:
        layers = largest_within(budget, held, expected_layers(setting, budget / formula[setting.world_size]))
    except NoFigures as failure:
        return Largest(method, str(failure), 0, 0, tried, formula)
    parameters = replace(setting, layers=layers).parameters if layers else 0
    return Largest(method, None, layers, parameters, tried, formula)


def expected_layers(setting: Setting, parameters: float) -> int:
    """How many there are in a model of so many parameters."""
    one, two = (replace(setting, layers=layers).parameters for layers in (1, 2))
    return max(1, int((parameters - one) / (two - one)) + 1)


def largest_within(budget: float, held: Callable[[int], float], expected: int) -> int:
    """The largest number from 1 to four times the expected one with which no more is held, if more is held with more; 0 where that
    is so with none.

    What is held grows by about as much with each, so the line through what was tried tells what to try next.
    """
    low, high = 0, 4 * expected + 1  # low fits, high does not
    tried: dict[int, float] = {}
    probe = expected
    while high - low > 1:
        tried[probe] = held(probe)
        if tried[probe] <= budget:
            low = probe
        else:
            high = probe
        probe = min(max(_last_on_line(tried, budget), low + 1), high - 1)
    return low


def _last_on_line(tried: Mapping[int, float], budget: float) -> int:
    """The largest number that fits by the line through the two tried ones that came nearest; through 0 where there is but one."""
    first, *others = sorted(tried, key=lambda number: abs(tried[number] - budget))
    second = others[0] if others else 0
    slope = (tried[first] - tried.get(second, 0.0)) / (first - second)
    return first if slope <= 0 else int(first + (budget - tried[first]) / slope)
