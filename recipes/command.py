"""What happens when a recipe is called: under torchrun it trains, and by itself it compares."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from recipes.method import METHODS
from recipes.outcome import Outcome
from recipes.side_by_side import Launch, compare

Train = Callable[[argparse.Namespace, torch.device], Outcome]
"""Trains on every rank of the default process group."""


def make_parser(recipe: str, description: str | None, presets: Collection[str]) -> argparse.ArgumentParser:
    """The options that all recipes have.

    Args:
        recipe: its folder's name.
        description: the docstring of the script.
        presets: names of sizes, the first of which is taken if none is asked for.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m recipes.{recipe}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(recipe=recipe)
    parser.add_argument(
        "--preset", choices=presets, default=next(iter(presets)), help="how large a model, and how long"
    )
    parser.add_argument(
        "--method", choices=METHODS, help="of this training; default: zeroopt, or without torchrun both"
    )
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads a rank; default: cores are shared out")
    parser.add_argument("--out", type=Path, default=Path("runs", recipe), help="folder of what is written")
    # Where `compare` looks for a training's figures:
    parser.add_argument("--outcome", type=Path, help=argparse.SUPPRESS)
    return parser


def main(train: Train, parser: argparse.ArgumentParser, launches: Sequence[Launch] = (Launch(),)) -> int:
    """Trains, where torchrun has started this process, or starts both methods in turn and compares them.

    Args:
        launches: what is started then, one after the other: some of these options, on some number of ranks.

    Returns:
        An exit code: 1 where something has not been learned, or methods have come to different losses.
    """
    args = parser.parse_args()
    if "RANK" not in os.environ:
        methods = list(METHODS) if args.method is None else [args.method]
        return compare(args.recipe, sys.argv[1:], methods, launches, args.out)
    args.method = args.method or "zeroopt"
    with process_group(args.threads) as device:
        outcome = train(args, device)
        if dist.get_rank() == 0:
            report(outcome, args.outcome)
    return 0


@contextmanager
def process_group(threads: int | None) -> Iterator[torch.device]:
    """Ranks as torchrun started them: with NCCL where each has a GPU, else with Gloo on CPUs. Where there is a process group, as in workers
    of Ray, it stays."""
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_ranks))
    device = torch.device("cpu")
    if torch.cuda.device_count() >= local_ranks:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        dist.barrier()
        time.sleep(0.1)  # Gloo's threads let go of the last tensors: during exit, that would abort the process
    finally:
        dist.destroy_process_group()


def report(outcome: Outcome, path: Path | None) -> None:
    if path is not None:
        outcome.write(path)
        return
    for title, text in outcome.texts.items():
        print(f"\n{title}\n{text}")
    for figure in outcome.figures:
        print(figure)
    print(
        f"{outcome.step_ms:.0f} ms a step, {outcome.peak_bytes / 1e6:.0f} MB a rank at the peak, "
        f"{outcome.held_bytes / 1e6:.0f} MB between steps"
    )


def rate_at(step: int, steps: int) -> float:
    """The share of the learning rate: a tenth of the steps to warm up, then half a cosine down to a tenth."""
    warmup = max(1, steps // 10)
    return min(1.0, (step + 1) / warmup) * (
        0.55 + 0.45 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
    )
