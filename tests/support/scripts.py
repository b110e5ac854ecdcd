"""Scripts on several ranks, in processes that end as those of scripts do: with their last line, an exception or a signal.

`run_scripts` starts this file, which imports what all of them need, which takes longer than they do, and forks the ranks:

    python scripts.py WORLD_SIZE FOLDER AWAITED SCRIPT ARGUMENT...

Each rank leaves in the folder what it has written, and this process, how the awaited ones have ended.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from paths import PYTHON_PATH
from worker_pool import WORKER_ENVIRONMENT

TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Ended:
    """How a rank has ended.

    Attributes:
        returncode: its exit status, or the negative number of the signal that has killed it.
        output, errors: what it has written.
    """

    returncode: int
    output: str
    errors: str


def run_scripts(
    world_size: int,
    folder: Path,
    script: str | Path,
    *arguments: str,
    environment: Mapping[str, str] = MappingProxyType({}),
    awaited: Sequence[int] | None = None,
) -> list[Ended]:
    """Run a script on ranks that find `RANK` and `WORLD_SIZE` in their environment.

    Args:
        folder: an empty one, for their outputs.
        environment: beside that of this process and of the workers of tests.
        awaited: of which ranks the end is awaited, and told; the others are killed then. None: all.
    """
    ranks = range(world_size) if awaited is None else awaited
    words = [str(world_size), str(folder), json.dumps(list(ranks)), str(script), *arguments]
    known = {
        **os.environ,
        **WORKER_ENVIRONMENT,
        "PYTHONPATH": PYTHON_PATH,
        **environment,
        "WORLD_SIZE": str(world_size),
    }
    with subprocess.Popen([sys.executable, __file__, *words], env=known, start_new_session=True) as process:
        try:
            process.wait(TIMEOUT_S)
        finally:
            with suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
    statuses = json.loads((folder / "statuses").read_text())
    return [
        Ended(status, *((folder / f"{rank}.{stream}").read_text() for stream in ("output", "errors")))
        for rank, status in zip(ranks, statuses, strict=True)
    ]


def main(world_size: int, folder: Path, awaited: Sequence[int], *words: str) -> None:
    import zeroopt  # noqa: F401

    gc.freeze()  # no rank looks through what it has not made
    processes = []
    for rank in range(world_size):
        process = os.fork()
        if process == 0:
            become(rank, folder, words)
            return
        processes.append(process)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(processes[rank], 0)[1]) for rank in awaited]
    (folder / "statuses").write_text(json.dumps(statuses))


def become(rank: int, folder: Path, words: Sequence[str]) -> None:
    """Run the script. This process ends as the script does."""
    os.environ["RANK"] = str(rank)
    for stream, name in ((sys.stdout, "output"), (sys.stderr, "errors")):
        with (folder / f"{rank}.{name}").open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), *sys.argv[4:])
