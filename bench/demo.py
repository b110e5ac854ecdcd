"""Train the same model by DistributedDataParallel and by zeroopt at stages 0, 1 and 2, and compare.

The last method is stage 2 with `share_parameters=True`: one copy of the weights for all ranks.

    python -m bench.demo

Each run is `examples/train_gpt.py` under torchrun on this machine. The methods take turns, so that a busy moment of the
machine favours none of them. Writes results.json and comparison.png; exits 1 when a run fails or the losses disagree.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.machine import describe_machine

METHODS = {
    "ddp": "DDP",
    "zero0": "stage 0",
    "zero1": "stage 1",
    "zero2": "stage 2",
    "zero2-shared": "stage 2, shared",
}
SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_gpt.py"
FINAL_STEPS = 10  # the final training loss is the mean of this many steps, for one step's batch is small
LOSS_TOLERANCE = 0.01  # the fused kernel rounds its last bits differently, and training amplifies that

RunOutcome = dict[str, Any]  # what train_gpt.py writes


class RunFailed(Exception):
    def __init__(self, method: str, exit_status: int, last_output: str) -> None:
        super().__init__(f"{METHODS[method]} exited with status {exit_status}. Its last output:\n{last_output}")


@dataclass
class Result:
    """One method's measurements over all rounds."""

    method: str
    parameters: int
    step_ms: float
    training_loss: list[float]
    validation_loss: float
    peak_bytes: int
    sent_bytes: float | None  # by a rank in a step

    @property
    def name(self) -> str:
        return METHODS[self.method]

    @property
    def final_training_loss(self) -> float:
        return statistics.fmean(self.training_loss[-FINAL_STEPS:])

    @property
    def bytes_per_parameter(self) -> float:
        return self.peak_bytes / self.parameters


def main() -> int:
    args = parse_arguments()
    console = Console()
    console.print(
        f"{len(METHODS)} methods in turn, {args.rounds} rounds: a GPT of {args.layers} layers of width {args.width}, "
        f"{args.steps} steps, on {args.world_size} processes with {args.threads} CPU thread(s) each",
        highlight=False,
    )
    try:
        results = [summarize(outcomes) for outcomes in run_all(args, console).values()]
    except RunFailed as failure:
        console.print(str(failure), markup=False, highlight=False)
        return 1
    console.print(make_table(results))
    write_report(results, args, console)
    return judge_losses(results, console)


def run_all(args: argparse.Namespace, console: Console) -> dict[str, list[RunOutcome]]:
    outcomes: dict[str, list[RunOutcome]] = {method: [] for method in METHODS}
    columns = TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        for round_number in range(1, args.rounds + 1):
            for method, name in METHODS.items():
                title = f"{name}, round {round_number}"
                task = progress.add_task(title, total=args.steps, loss="")

                def show(step: int, loss: float, task: Any = task) -> None:
                    progress.update(task, completed=step, loss=f"loss {loss:.2f}")

                outcome = run_once(method, args, show)
                outcomes[method].append(outcome)
                if not console.is_terminal:
                    print(f"{title}: {statistics.median(outcome['step_ms']):.0f} ms a step", flush=True)
    return outcomes


def run_once(method: str, args: argparse.Namespace, show: Callable[[int, float], None]) -> RunOutcome:
    with tempfile.TemporaryDirectory() as folder:
        outcome_path = Path(folder) / "outcome.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.world_size}"),
            *(str(SCRIPT), f"--method={method}", f"--json={outcome_path}", "--progress"),
            *(f"--{option}={getattr(args, option)}" for option in ("steps", "threads", "layers", "width", "batch")),
        ]
        exit_status, last_output = follow(command, args, show)
        if exit_status != 0:
            raise RunFailed(method, exit_status, last_output)
        outcome: RunOutcome = json.loads(outcome_path.read_text())
        return outcome


def follow(command: list[str], args: argparse.Namespace, show: Callable[[int, float], None]) -> tuple[int, str]:
    """Runs a command, shows its progress lines as they come, and returns its status and the last of its other lines."""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    last_lines: deque[str] = deque(maxlen=50)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        deadline = threading.Timer(args.timeout, child.terminate)
        deadline.start()
        for line in child.stdout:
            if line.startswith('{"step"'):
                progress = json.loads(line)
                show(progress["step"], progress["loss"])
            else:
                last_lines.append(line)
        child.wait()
        if not deadline.is_alive():
            last_lines.append(f"It was stopped after {args.timeout:.0f} seconds (--timeout).\n")
        deadline.cancel()
    return child.returncode, "".join(last_lines)


def summarize(outcomes: list[RunOutcome]) -> Result:
    """The median time of all rounds' steps; the least traffic, for other programs can only add to what is counted."""
    first = outcomes[0]
    sent_bytes = [outcome["sent_bytes"] for outcome in outcomes if outcome["sent_bytes"] is not None]
    return Result(
        method=first["method"],
        parameters=first["parameters"],
        step_ms=statistics.median(time for outcome in outcomes for time in outcome["step_ms"]),
        training_loss=first["training_loss"],
        validation_loss=first["validation_loss"],
        peak_bytes=max(outcome["peak_bytes"] for outcome in outcomes),
        sent_bytes=min(sent_bytes, default=None),
    )


def make_table(results: list[Result]) -> Table:
    baseline = results[0]
    caption = (
        "loss: mean of the last steps. step: median time. peak: memory of a rank above the level before the model; of shared "
        "pages, a rank's part. sent: over the network stack, by a rank in a step."
    )
    table = Table(
        title=f"{baseline.parameters / 1e6:.1f} M parameters, float32, AdamW", caption=caption, box=box.SIMPLE
    )
    table.add_column("\nmethod", no_wrap=True)
    for heading in (
        "training\nloss",
        "valid.\nloss",
        "step\nms",
        "speed\nvs DDP",
        "peak\nMB",
        "bytes/\nparam",
        "sent\nMB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.name,
            f"{result.final_training_loss:.4f}",
            f"{result.validation_loss:.4f}",
            f"{result.step_ms:.0f}",
            f"{baseline.step_ms / result.step_ms:.2f}x",
            f"{result.peak_bytes / 1e6:.0f}",
            f"{result.bytes_per_parameter:.1f}",
            "-" if result.sent_bytes is None else f"{result.sent_bytes / 1e6:.1f}",
        )
    return table


def write_report(results: list[Result], args: argparse.Namespace, console: Console) -> None:
    report, picture = args.out / "results.json", args.out / "comparison.png"
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "bench.demo", *sys.argv[1:]]),
        "options": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": describe_machine(),
        "results": [asdict(result) for result in results],
    }
    report.write_text(json.dumps(facts, indent=1) + "\n")
    draw(results, picture)
    console.print(f"Written to {report} and {picture}", soft_wrap=True, highlight=False)


def draw(results: list[Result], path: Path) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    losses, memory, times = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    draw_losses(losses, results)
    draw_bars(memory, "peak memory, bytes a parameter", results, [result.bytes_per_parameter for result in results])
    draw_bars(times, "median step, ms", results, [result.step_ms for result in results])
    figure.savefig(path, dpi=120)


def draw_losses(axes: Axes, results: list[Result]) -> None:
    """Each curve thinner than the one below it, so that all can be seen where they coincide."""
    for i, result in enumerate(results):
        axes.plot(result.training_loss, label=result.name, linewidth=2 * (len(results) - i) - 1, color=f"C{i}")
    axes.set_title("training loss")
    axes.set_xlabel("step")
    axes.legend()


def draw_bars(axes: Axes, title: str, results: list[Result], heights: list[float]) -> None:
    bars = axes.bar([result.name for result in results], heights, color=[f"C{i}" for i in range(len(results))])
    axes.bar_label(bars, fmt="%.1f")
    axes.set_title(title)


def judge_losses(results: list[Result], console: Console) -> int:
    """0 when every method ended where DDP did, else 1."""
    baseline = results[0]
    training = [abs(result.final_training_loss - baseline.final_training_loss) for result in results]
    validation = [abs(result.validation_loss - baseline.validation_loss) for result in results]
    agreed = all(difference <= LOSS_TOLERANCE for difference in training + validation)  # never so for NaN
    verdict = "The final losses agree" if agreed else "The final losses DISAGREE"
    console.print(
        f"{verdict}: at most {max(training):.1g} (training) and {max(validation):.1g} (validation) "
        f"away from DDP; {LOSS_TOLERANCE} is allowed",
        style="green" if agreed else "bold red",
        highlight=False,
    )
    return 0 if agreed else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="how often every method runs")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a process")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4, help="sequences a rank and step")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a run counts as hung")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
