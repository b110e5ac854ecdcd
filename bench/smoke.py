"""Every benchmark with next to nothing to do, to see that they work; `make bench-smoke`.

All run in this process, so that torch is imported once for them, and once for all of their ranks.
The first one that fails ends it.
"""

from __future__ import annotations

import shlex
import sys
from importlib import import_module
from unittest.mock import patch

from rich.console import Console

COMPARE = "compare --model tiny --vocabulary 256 --tokens 8 --rounds 1 --steps 1 --out runs/smoke"
TINY = "--layers 1 --width 64 --tokens 16"
COMMANDS = f"""\
{COMPARE}/results.json
{COMPARE}/half.json --precision bfloat16 --accumulation 2 --world-sizes 1 3 --methods "zeroopt stage 2" "no masters" remainders
{COMPARE}/largest.json --budget-mb 2 --methods "DDP, bucket views, fused AdamW" "zeroopt stage 2"
report runs/smoke/results.json
steps {TINY} --rounds 1 --steps 1
memory --models gpt-tiny --steps 1 --methods DDP "stage 2" --out runs/smoke/memory.json
planner runs/smoke/memory.json
checkpoint {TINY} --rounds 1 --methods "(the files alone)" "stage 2"
collectives --mb 1 --turns 1
network --smoke --methods "no communication" DDP "zeroopt stage 2" --out runs/smoke/network.json
simulator {TINY} --steps 1 --windows 1 --world-sizes 2 --links --methods DDP "zeroopt stage 2"
scale --models "1.5 B" --gpus 8 64 --buckets-mb 100
ranks --world-sizes 2 --layers 2 --steps 2
kernels --gib 0.001 --rounds 2 --threads 1
kills --kills 10
kills --kills 10 --without-disk --any-ranks
soak --minutes 0.3
gpu --rehearse --out runs/smoke/gpu
""".splitlines()


def main() -> None:
    """Ends the process with the status of the first benchmark that fails."""
    console = Console()
    for line in COMMANDS:
        console.rule(line, align="left")
        run(*shlex.split(line))


def run(name: str, *arguments: str) -> None:
    """One benchmark, by its name in this package."""
    module = import_module(f"bench.{name}")
    if hasattr(module, "__path__"):
        module = import_module(f"bench.{name}.__main__")
    with patch.object(sys, "argv", [name, *arguments]):
        status = module.main()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
