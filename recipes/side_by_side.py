"""DistributedDataParallel and zeroopt, one after the other in processes of their own: a table, a plot, and what to think of them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from rich import box
from rich.console import Console
from rich.table import Table

from recipes.method import METHODS
from recipes.outcome import Outcome, differences

FIRST_TOLERANCE = 1e-4  # of the first steps: float32 sums in another order
LAST_TOLERANCE = 0.03  # of the last ones: training has made the former larger, step by step


@dataclass(frozen=True)
class Launch:
    """What torchrun is to start.

    Attributes:
        title: of its table.
        world_size: ranks on this machine.
        arguments: of the recipe, besides those of the whole comparison.
    """

    title: str = ""
    world_size: int = 2
    arguments: tuple[str, ...] = ()


Outcomes = list[tuple[Launch, dict[str, Outcome]]]
"""By launch, and by method."""


class TrainingFailed(Exception):
    pass


def compare(
    recipe: str, arguments: Sequence[str], methods: Sequence[str], launches: Sequence[Launch], out: Path
) -> int:
    """Train by every method, print tables, and write results.json and comparison.png to `out`.

    Returns:
        An exit code: 0 where everything was learned, and all methods came to the same losses.
    """
    console = Console()
    outcomes: Outcomes = [(launch, {}) for launch in launches]
    try:
        with TemporaryDirectory() as scratch:
            for method in methods:  # its launches may build on one another
                for launch, by_method in outcomes:
                    console.rule(f"{METHODS[method]}, {launch.world_size} ranks {launch.title}".rstrip())
                    by_method[method] = start(recipe, arguments, method, launch, Path(scratch))
    except TrainingFailed as failure:
        console.print(str(failure), style="bold red", markup=False, highlight=False)
        return 1
    for launch, by_method in outcomes:
        console.print(make_table(recipe, launch, by_method))
    show_texts(outcomes[-1][1], console)
    write(recipe, arguments, outcomes, out)
    console.print(f"Written to {out / 'results.json'} and {out / 'comparison.png'}", soft_wrap=True, highlight=False)
    return judge(outcomes, console)


def start(recipe: str, arguments: Sequence[str], method: str, launch: Launch, scratch: Path) -> Outcome:
    """One training in processes of its own, so that its peak of memory is its own.

    Raises:
        TrainingFailed: a rank has not ended well. What it said has been printed by then.
    """
    path = scratch / "outcome.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={launch.world_size}"),
        *("-m", f"recipes.{recipe}", *arguments, *launch.arguments),
        *(f"--method={method}", f"--outcome={path}"),
    ]
    root = Path(__file__).resolve().parents[1]
    search = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    silent = {"OMP_NUM_THREADS": "1"}  # torchrun warns without it; threads are set later
    environment = {**silent, **os.environ, "PYTHONPATH": search}
    status = subprocess.run(command, env=environment, check=False).returncode
    if status != 0:
        raise TrainingFailed(f"{METHODS[method]} ended with status {status}: {shlex.join(command)}")
    return Outcome.read(path)


def make_table(recipe: str, launch: Launch, by_method: dict[str, Outcome]) -> Table:
    some = next(iter(by_method.values()))
    where = f"{some.world_size} ranks on {some.device}"
    title = f"{recipe} {launch.title}".rstrip()
    table = Table(
        title=f"{title}: {some.parameters / 1e6:.2f} M parameters, {where}",
        caption="losses: means of the last steps. step: median. peak, held: of a rank, beyond what it held before the model.",
        box=box.SIMPLE,
        pad_edge=False,
    )
    table.add_column("\nmethod", no_wrap=True)
    headings = [f"loss,\n{phase}" for phase in some.losses] + [f"\n{figure.name}" for figure in some.figures]
    for heading in (*headings, "step\nms", "peak\nMB", "held\nMB"):
        table.add_column(heading, justify="right")
    for method, outcome in by_method.items():
        table.add_row(
            METHODS[method],
            *(f"{outcome.final_loss(phase):.4f}" for phase in outcome.losses),
            *(f"{figure.value:.4f}" for figure in outcome.figures),
            f"{outcome.step_ms:.0f}",
            f"{outcome.peak_bytes / 1e6:.0f}",
            f"{outcome.held_bytes / 1e6:.0f}",
        )
    for figure in {figure.reference_of: figure for figure in some.figures}.values():
        references = [
            f"{other.reference:.4f}" if other.reference_of == figure.reference_of else "" for other in some.figures
        ]
        table.add_row(f"({figure.reference_of})", *("" for _ in some.losses), *references, "", "", "")
    return table


def show_texts(by_method: dict[str, Outcome], console: Console) -> None:
    """Of the last method: by all of them, they are about the same."""
    for title, text in list(by_method.values())[-1].texts.items():
        console.print(title, style="bold", markup=False, highlight=False)
        console.print(text, markup=False, highlight=False)
        console.print()


def write(recipe: str, arguments: Sequence[str], outcomes: Outcomes, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    launched = [
        {"title": launch.title, "outcomes": {method: asdict(outcome) for method, outcome in by_method.items()}}
        for launch, by_method in outcomes
    ]
    facts = {"command": shlex.join(["python", "-m", f"recipes.{recipe}", *arguments]), "launches": launched}
    (out / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(outcomes, out / "comparison.png")


def draw(outcomes: Outcomes, path: Path) -> None:
    phases = [(by_method, phase) for _, by_method in outcomes for phase in next(iter(by_method.values())).losses]
    picture = Picture(figsize=(4 * len(phases) + 5, 4), layout="constrained")
    *curves, memory, times = picture.subplots(1, len(phases) + 2, width_ratios=(*(2 for _ in phases), 1, 1))
    for axes, (by_method, phase) in zip(curves, phases, strict=True):
        draw_losses(axes, phase, by_method)
    last = outcomes[-1][1]
    draw_bars(memory, "peak memory, MB", {name: outcome.peak_bytes / 1e6 for name, outcome in last.items()})
    draw_bars(times, "step, ms", {name: outcome.step_ms for name, outcome in last.items()})
    picture.savefig(path, dpi=120)


def draw_losses(axes: Axes, phase: str, by_method: dict[str, Outcome]) -> None:
    """Each curve thinner than the one below it, so that both can be seen where they coincide."""
    for i, (method, outcome) in enumerate(by_method.items()):
        width = 2 * (len(by_method) - i) - 1
        axes.plot(outcome.losses[phase], label=METHODS[method], linewidth=width, color=f"C{i}")
    axes.set_title(f"loss, {phase}")
    axes.set_xlabel("step")
    axes.legend()


def draw_bars(axes: Axes, title: str, heights: dict[str, float]) -> None:
    colors = [f"C{i}" for i in range(len(heights))]
    bars = axes.bar([METHODS[method] for method in heights], list(heights.values()), color=colors)
    axes.bar_label(bars, fmt="%.0f")
    axes.set_title(title)


def judge(outcomes: Outcomes, console: Console) -> int:
    """Says whether everything was learned, and whether losses agree; 0 where both hold."""
    good = True
    for number, (launch, by_method) in enumerate(outcomes):
        for method, outcome in by_method.items():
            for figure in outcome.figures:
                verb = "learned" if figure.learned else "has NOT learned"
                console.print(f"{METHODS[method]} {verb}: {figure}", style=color(figure.learned), highlight=False)
            good = good and outcome.learned
        if len(by_method) > 1:
            good = judge_losses(launch, by_method, goes_on=number > 0, console=console) and good
    return 0 if good else 1


def judge_losses(launch: Launch, by_method: dict[str, Outcome], *, goes_on: bool, console: Console) -> bool:
    """Whether losses agree. A launch that goes on from another one begins where rounding had led."""
    first, last = of_all(by_method)
    allowed = LAST_TOLERANCE if goes_on else FIRST_TOLERANCE
    agreed = first <= allowed and last <= LAST_TOLERANCE
    console.print(
        f"Losses {'agree' if agreed else 'DISAGREE'}{launch.title and ', ' + launch.title}: {first:.1g} of them apart in the first "
        f"steps ({allowed} is allowed), {last:.1g} in the last ({LAST_TOLERANCE})",
        style=color(agreed),
        highlight=False,
    )
    return agreed


def of_all(by_method: dict[str, Outcome]) -> tuple[float, float]:
    """The largest differences from the first method."""
    baseline, *others = by_method.values()
    pairs = [differences(baseline, other) for other in others]
    return max((first for first, _ in pairs), default=0.0), max((last for _, last in pairs), default=0.0)


def color(good: bool) -> str:
    return "green" if good else "bold red"
