"""What a training has come to: losses, what it took, and the figures that say whether it learned."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

FINAL_STEPS = 10  # a step's loss is of one small batch: what counts is the mean of the last ones


@dataclass(frozen=True)
class Figure:
    """A number of a trained model beside the same number of one that has not learned it.

    Attributes:
        name: such as "validation loss".
        value: of the trained model.
        reference: of the other one.
        reference_of: which that is, such as "untrained".
        higher_is_better: as for an accuracy. Otherwise lower is, as for a loss.
    """

    name: str
    value: float
    reference: float
    reference_of: str = "untrained"
    higher_is_better: bool = False

    @property
    def learned(self) -> bool:
        return self.value > self.reference if self.higher_is_better else self.value < self.reference

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3f} ({self.reference_of}: {self.reference:.3f})"


@dataclass(frozen=True)
class Outcome:
    """A training by one method, as rank 0 writes it down.

    Attributes:
        parameters: how many the model has.
        losses: of every step, by phase; means over ranks.
        step_ms: the median step's time in the first phase.
        peak_bytes: the most that a rank has held beyond what it held before there was a model.
        held_bytes: what a rank holds between two steps, likewise.
        texts: what the trained model has written, or other things to show, by title.
    """

    method: str
    preset: str
    world_size: int
    device: str
    parameters: int
    losses: dict[str, list[float]]
    step_ms: float
    peak_bytes: int
    held_bytes: int
    figures: list[Figure]
    texts: dict[str, str]

    @property
    def learned(self) -> bool:
        return all(figure.learned for figure in self.figures)

    def final_loss(self, phase: str) -> float:
        """The mean of a phase's last steps."""
        return statistics.fmean(self.losses[phase][-FINAL_STEPS:])

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> Outcome:
        values = json.loads(path.read_text())
        return Outcome(**{**values, "figures": [Figure(**figure) for figure in values["figures"]]})


def state_at(step: int) -> str:
    """What a model is called that has been trained for so many steps, as the reference of a `Figure`."""
    return f"after {step} steps" if step else "untrained"


def differences(one: Outcome, other: Outcome) -> tuple[float, float]:
    """How far the losses of two methods are apart, as a share of the loss: at most in the first steps of all, and at most in the mean of
    a phase's last steps, where rounding has had time to grow. Infinite where the phases are others, or a loss is no number."""
    if one.losses.keys() != other.losses.keys():
        return math.inf, math.inf
    phase = next(iter(one.losses))
    first = zip(one.losses[phase][:FINAL_STEPS], other.losses[phase][:FINAL_STEPS], strict=True)
    return (
        max(apart(*pair) for pair in first),
        max(apart(one.final_loss(phase), other.final_loss(phase)) for phase in one.losses),
    )


def apart(one: float, other: float) -> float:
    difference = abs(one - other) / max(abs(one), abs(other), 1e-12)
    return math.inf if math.isnan(difference) else difference
