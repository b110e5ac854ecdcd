"""What benchmarks on several ranks have in common: how their ranks are started, and what their report says.

Such a module runs twice: as the command that a user calls, and, with the hidden option --figures, as each of the ranks that
this command starts under torchrun. Rank 0 writes the figures there.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from bench.machine import describe_machine

Torchrun = subprocess.Popen[bytes]


class Ranks(Protocol):
    """How many, and with how many threads each."""

    @property
    def world_size(self) -> int: ...
    @property
    def threads(self) -> int: ...


@contextmanager
def running_ranks(
    module: str, options: Sequence[str], ranks: Ranks, figures: Path, output: IO[bytes] | None = None
) -> Iterator[Torchrun]:
    """Ranks at work. Waits for them in the end. What they print goes to `output`, or where this process prints."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks.world_size}"),
        *("-m", module, *options, f"--figures={figures}"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(ranks.threads)}
    with subprocess.Popen(command, env=environment, stdout=output, stderr=output) as torchrun:
        try:
            yield torchrun
        except BaseException:
            torchrun.terminate()
            raise


def run_ranks(module: str, options: Sequence[str], ranks: Ranks) -> Any:
    """What rank 0 has measured. Exits with torchrun's status when a rank fails; torchrun has then said why."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        with running_ranks(module, options, ranks, figures) as torchrun:
            exit_unless_zero(torchrun.wait())
        return json.loads(figures.read_text())


def exit_unless_zero(status: int) -> None:
    if status:
        sys.exit(status)


def write_figures(figures: object, path: Path) -> None:
    """The whole file at once, for somebody may wait for it to appear."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(figures))
    unfinished.rename(path)


def write_report(path: Path, module: str, figures: dict[str, object]) -> None:
    """The figures with the command that gave them and the machine that it ran on, as JSON."""
    command = " ".join(["python", "-m", module, *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "machine": describe_machine(), **figures}, indent=1) + "\n")
