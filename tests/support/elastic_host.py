"""examples/elastic.py as torchrun starts it, on two hosts; `python elastic_host.py lost|stays OPTIONS`.

The host that is lost goes in the middle of its seventh step, when the checkpoint of the fourth is there: its rank and its agent are
killed. The other one begins when there are two, or what they have saved.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

LAST_STEP = 6
SAVED_STEP = 4


def main() -> None:
    """Run the example, and be lost if that is wanted."""
    is_lost = sys.argv.pop(1) == "lost"
    examples = Path(__file__).resolve().parents[2] / "examples"
    sys.path.insert(0, str(examples))
    import elastic

    checkpoints = Path(next(word.partition("=")[2] for word in sys.argv if word.startswith("--checkpoints=")))
    saved = checkpoints / f"step-{SAVED_STEP}"
    if os.environ["WORLD_SIZE"] == "1" and not saved.exists():
        signal.pause()  # until the agent has met the other one, and starts anew
    train_on = elastic.Run.train_on

    def train_on_and_be_lost(run: elastic.Run, batch: object) -> None:
        if run.step == LAST_STEP:
            while not saved.exists():
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        train_on(run, batch)

    if is_lost:
        elastic.Run.train_on = train_on_and_be_lost
    elastic.main()


if __name__ == "__main__":
    main()
