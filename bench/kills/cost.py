"""What copies in memory cost: steps with and without them, in turn.

    python -m bench.kills.cost --layers 8 --width 512 --world-size 2

Blocks of steps take turns in the same ranks. The ratio is of the medians of all steps, so a machine that others use changes both.
"""

import argparse
import os
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import zeroopt
from bench.launch import Plan, run_ranks
from bench.model import make_model
from zeroopt.elastic import Guard

VOCABULARY = 256
BLOCK = 5
WARM = 2


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps, and of calls of `guard.step`. Of one rank."""
    torch.manual_seed(0)
    net = make_model(VOCABULARY, args.tokens, args.layers, args.width)
    model, optimizer = zeroopt.wrap(net, torch.optim.AdamW(net.parameters()), stage=2)
    guard = Guard(model, optimizer, job=f"bench-cost-{os.getppid()}")
    tokens = torch.randint(VOCABULARY, (args.batch, args.tokens))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    calls, step = [], 0
    for turn in range(2 * args.rounds):
        copies = turn % 2 == 1
        for number in range(BLOCK + WARM):
            begin = time.perf_counter()
            model(tokens, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            stepped = time.perf_counter()
            if copies:
                guard.step(step)
            end = time.perf_counter()
            if number >= WARM:
                seconds[copies].append(end - begin)
                if copies:
                    calls.append(end - stepped)
        guard.wait()
        dist.barrier()
    guard.close()
    without, with_copies = (statistics.median(seconds[one]) for one in (False, True))
    return {"without": without, "with": with_copies, "call": statistics.median(calls)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kills.cost", description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--world-size", type=int, default=2)
    args = parser.parse_args()
    first, *_ = run_ranks(Plan(args.world_size, threads=1), measure, args)
    print(
        f"a step without copies {1e3 * first['without']:.1f} ms, with {1e3 * first['with']:.1f} ms: {first['with'] / first['without']:.3f} "
        f"times; guard.step takes {1e3 * first['call']:.1f} ms of it"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
