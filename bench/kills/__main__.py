"""The command line."""

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.kills.runs import Kill, Run, Tally
from bench.launch import Plan, write_report

LIMIT_S = 600.0  # of one start


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-a-run", type=int, default=10)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--without-disk", action="store_true", help="go on from copies in memory")
    parser.add_argument("--any-ranks", action="store_true", help="each start has 1, 2, 4 ... ranks, up to --world-size")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="write the figures here")
    args = parser.parse_args()

    draws, tally = random.Random(args.seed), Tally()
    plan = Plan(args.world_size, threads=1, timeout_s=LIMIT_S, quiet=True)
    options: dict[str, Any] = {"stage": args.stage, "transport": args.transport}
    kinds: dict[str, Any] = {"without_disk": args.without_disk, "any_ranks": draws if args.any_ranks else None}
    expected = Run(plan, options, tally, **kinds).to_its_end([])
    runs = different = 0
    while (left := args.kills - tally.kills.total()) > 0:
        kills = [Kill.draw(draws, args.world_size) for _ in range(min(left, args.kills_a_run))]
        found = Run(plan, options, tally, **kinds).to_its_end(kills)
        runs += 1
        different += found != expected or not found.is_one
        print(f"{tally.kills.total()} kills, {different} of {runs} runs ended otherwise, {tally.hung} hung", flush=True)
    figures = describe(tally) | {"runs": runs, "different": different}
    for name, value in figures.items():
        print(f"{name}: {value}")
    if args.out:
        write_report(args.out, "bench.kills", figures)
    return 1 if different or tally.hung else 0


def describe(tally: Tally) -> dict[str, Any]:
    """Figures for people."""
    return {
        "kills": dict(sorted(tally.kills.items())),
        "hung": tally.hung,
        "others_ended_in_s": spread(tally.ended_in_s),
        "going_on_in_s": spread(tally.going_on_in_s),
        "steps_again": spread(tally.steps_again),
    }


def spread(values: list[Any]) -> dict[str, float]:
    """Median and largest."""
    if not values:
        return {}
    return {"median": round(statistics.median(values), 3), "most": round(max(values), 3)}


if __name__ == "__main__":
    sys.exit(main())
