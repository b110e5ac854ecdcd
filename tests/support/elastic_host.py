"""examples/elastic.py as torchrun starts it; `python elastic_host.py lost|stays|killed|trains|waits OPTIONS`.

A host that is lost goes in the middle of its seventh step, when the checkpoint of the fourth is there: its rank and its agent are
killed. The other one, which stays, begins when there are two, or what they have saved. Where a rank is killed, it is the last
one, in the same step, when ranks are started for the first time.

Who trains, or waits, says so when it hears of a signal. For whom it waits is the last rank, which stops itself before that step.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

LAST_STEP = 6
SAVED_STEP = 4


def main() -> None:
    """Run the example, and be lost if that is wanted."""
    kind = sys.argv.pop(1)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    import elastic

    from zeroopt.checkpoint import StopRequest

    checkpoints = Path(next(word.partition("=")[2] for word in sys.argv if word.startswith("--checkpoints=")))
    saved = checkpoints / f"step-{SAVED_STEP}"
    if kind == "stays" and os.environ["GROUP_WORLD_SIZE"] == "1" and not saved.exists():
        signal.pause()  # until the agent has met the other one, and starts anew
    train_on = elastic.Run.train_on
    is_last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    is_first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def train_on_or_die(run: elastic.Run, batch: object) -> None:
        if run.step == LAST_STEP and kind == "lost":
            while not saved.exists():
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if run.step == LAST_STEP and kind == "killed" and is_last and is_first_start:
            run.guard.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        if run.step == LAST_STEP and kind == "waits" and is_last:
            os.kill(os.getpid(), signal.SIGSTOP)
        train_on(run, batch)

    note = StopRequest._note

    def note_and_say(request: StopRequest, number: int, frame: FrameType | None) -> None:
        note(request, number, frame)
        print("heard", flush=True)

    StopRequest._note = note_and_say  # type: ignore[method-assign]
    elastic.Run.train_on = train_on_or_die
    elastic.main()


if __name__ == "__main__":
    main()
