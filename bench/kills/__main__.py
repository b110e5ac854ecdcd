"""The command line."""

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.kills.kinds import KINDS
from bench.kills.runs import Kill, Run, Tally
from bench.launch import Plan, write_report

LIMIT_S = 600.0  # of one start


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kills", description=__doc__)
    what = f"what is trained: all, or some of {', '.join(KINDS)}"
    parser.add_argument("--training", nargs="+", default=["plain"], choices=[*KINDS, "all"], metavar="KIND", help=what)
    parser.add_argument("--kills", type=int, default=100, help="of each kind of training")
    parser.add_argument("--kills-a-run", type=int, default=10)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--without-disk", action="store_true", help="go on from copies in memory")
    parser.add_argument("--hosts", type=int, default=1, help="that ranks are on: one is lost with its memory")
    parser.add_argument("--any-ranks", action="store_true", help="each start has 1, 2, 4 ... ranks, up to --world-size")
    parser.add_argument("--transport", default="auto", help="where the kind of training does not say it")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="write the figures here")
    args = parser.parse_args()
    names = list(KINDS) if "all" in args.training else args.training
    if args.hosts > 1 and not args.without_disk:
        parser.error("--hosts is about copies in memory: it needs --without-disk")
    if args.any_ranks and not all(KINDS[name].any_ranks for name in names):
        able = ", ".join(name for name, kind in KINDS.items() if kind.any_ranks)
        parser.error(f"--any-ranks: the bits of these kinds alone are the same on any number of ranks: {able}")
    figures = {name: kill(name, args) for name in names}
    if args.out:
        write_report(args.out, "bench.kills", {"kinds": figures})
    return 1 if any(of_kind["different"] or of_kind["hung"] for of_kind in figures.values()) else 0


def kill(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What came of a kind of training."""
    draws, tally, kind = random.Random(f"{name} {args.seed}"), Tally(), KINDS[name].by(args.transport)
    plan = Plan(max(args.world_size, kind.least_ranks), threads=1, timeout_s=LIMIT_S, quiet=True)
    options = {"without_disk": args.without_disk, "hosts": args.hosts, "any_ranks": draws if args.any_ranks else None}
    expected = Run(plan, kind, tally, **options).to_its_end([])
    runs = different = 0
    while (left := args.kills - tally.kills.total()) > 0:
        kills = [Kill.draw(draws, plan.world_size) for _ in range(min(left, args.kills_a_run))]
        found = Run(plan, kind, tally, **options).to_its_end(kills)
        runs += 1
        different += found != expected or not found.is_one
        told = f"{tally.kills.total()} kills, {different} of {runs} runs ended otherwise, {tally.hung} hung"
        print(f"{name}: {told}", flush=True)
    figures = describe(tally) | {"runs": runs, "different": different}
    for figure, value in figures.items():
        print(f"    {figure}: {value}")
    return figures


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
