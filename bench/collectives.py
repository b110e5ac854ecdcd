"""Time of a bucket's reduce-scatter and all-gather by each transport, against Gloo's all_reduce of the same bucket.

    python -m bench.collectives --world-size 2 --mb 64

All of them do the same: every rank begins with a bucket of its own, and in the end all ranks have the sum, in the same memory.
They live side by side in the same processes and take turns, so that a busy moment of the machine favours none of them. A turn
lasts until the last rank is through; the figures are medians over turns. Before the all-gather, ranks wait until nobody uses
its bucket any more, as an optimizer's step does; that is part of the total.

    tree                     small slices in rounds, large ones as pairwise (`zeroopt.collectives.tree`)
    torch                    Gloo's own reduce_scatter_tensor and all_gather_into_tensor
    shm, share_parameters    sums go to one bucket of all ranks, where there is nothing left to gather
    hybrid                   as if half of the ranks were on another host; takes four ranks or more
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from bench.launch import Plan, run_ranks, write_report
from zeroopt.collectives import Transport
from zeroopt.collectives.all_to_all import AllToAllTransport
from zeroopt.collectives.hybrid import HybridTransport
from zeroopt.collectives.pairwise import PairwiseTransport
from zeroopt.collectives.shm import ShmTransport
from zeroopt.collectives.torch_native import TorchTransport
from zeroopt.collectives.tree import TreeTransport

ALL_REDUCE = "all_reduce"
CPU = torch.device("cpu")


def hybrid(group: dist.ProcessGroup) -> Transport:
    half = group.size() // 2
    return HybridTransport(group, [range(half), range(half, group.size())])


TRANSPORTS: dict[str, Callable[[dist.ProcessGroup], Transport]] = {
    "torch": lambda group: TorchTransport(group, CPU),
    "all_to_all": lambda group: AllToAllTransport(group, CPU),
    "pairwise": PairwiseTransport,
    "tree": TreeTransport,
    "shm": lambda group: ShmTransport(group, range(group.size())),
    "shm, share_parameters": lambda group: ShmTransport(group, range(group.size())),
    "hybrid": hybrid,
}

Seconds = dict[str, float]  # of one turn: the total, and of what it consists


class AllReduce:
    """Gloo's all_reduce of a bucket."""

    def __init__(self, numel: int) -> None:
        self.bucket = self.result = torch.zeros(numel)

    def exchange(self) -> Seconds:
        start = time.perf_counter()
        dist.all_reduce(self.bucket)
        return {"total": time.perf_counter() - start}


class Halves:
    """A transport's reduce-scatter and all-gather of a bucket."""

    def __init__(self, transport: Transport, numel: int, *, shared: bool) -> None:
        self.transport = transport
        self.bucket = self.result = transport.allocate(numel, torch.float32, CPU)
        if shared:
            self.result = transport.allocate(numel, torch.float32, CPU, shared=True)

    def exchange(self) -> Seconds:
        start = time.perf_counter()
        reducing = self.transport.start_reduce_scatter(self.bucket, self.transport.own_slice(self.result))
        reducing.finish()
        reduced = time.perf_counter()
        reducing.wait_until_read()
        self.transport.start_rendezvous("bucket").finish()
        everyone_came = time.perf_counter()
        gathering = self.transport.start_all_gather(self.result)
        self.transport.flush()
        gathering.finish()
        end = time.perf_counter()
        return {"reduce_scatter": reduced - start, "all_gather": end - everyone_came, "total": end - start}


def work(args: argparse.Namespace) -> dict[str, list[Seconds]]:
    """What every rank does. By transport, of each turn."""
    group = dist.group.WORLD
    assert group is not None
    numel = numel_of_bucket(args)
    contestants: dict[str, AllReduce | Halves] = {ALL_REDUCE: AllReduce(numel)}
    for name in transports_of(args):
        contestants[name] = Halves(TRANSPORTS[name](group), numel, shared="share_parameters" in name)
    for name, contestant in contestants.items():
        check(name, contestant)
    turns: dict[str, list[Seconds]] = {name: [] for name in contestants}
    for _ in range(args.turns):
        for name, contestant in contestants.items():
            dist.barrier()
            turns[name].append(contestant.exchange())
    return turns


def numel_of_bucket(args: argparse.Namespace) -> int:
    """As many elements for every rank."""
    numel: int = int(args.mb * 10**6) // 4 // args.world_size * args.world_size
    return numel


def transports_of(args: argparse.Namespace) -> list[str]:
    can_be_hybrid = args.world_size >= 4 and args.world_size % 2 == 0
    return [name for name in args.transports if name != "hybrid" or can_be_hybrid]


def check(name: str, contestant: AllReduce | Halves) -> None:
    """Run it on numbers, which also makes its memory resident, and leave zeros: they stay what they are in every turn."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    contestant.bucket.fill_(rank + 1)
    dist.barrier()
    contestant.exchange()
    expected = world_size * (world_size + 1) / 2
    if not (contestant.result == expected).all():
        raise RuntimeError(f"{name}: expected the sum {expected} in every element, on rank {rank}")
    dist.barrier()
    contestant.bucket.zero_()
    contestant.exchange()


def summarize(ranks: list[dict[str, list[Seconds]]]) -> dict[str, Seconds]:
    """Medians over turns, of the last rank's time."""
    results = {}
    for name, turns in ranks[0].items():
        parts = {
            part: [max(rank[name][turn][part] for rank in ranks) for turn in range(len(turns))] for part in turns[0]
        }
        results[name] = {part: statistics.median(times) for part, times in parts.items()}
    return results


def make_table(results: dict[str, Seconds], bucket_bytes: int, args: argparse.Namespace) -> Table:
    table = Table(
        title=f"{bucket_bytes / 1e6:g} MB of float32, {args.world_size} ranks",
        caption="GB/s: bytes of the bucket by total time",
        box=box.SIMPLE,
    )
    table.add_column("", no_wrap=True)
    for heading in ("reduce-\nscatter ms", "all-\ngather ms", "total\nms", "speed vs\nall_reduce", "GB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, seconds in results.items():
        halves = [f"{1e3 * seconds[part]:.1f}" if part in seconds else "" for part in ("reduce_scatter", "all_gather")]
        ratio = results[ALL_REDUCE]["total"] / seconds["total"]
        bandwidth = bucket_bytes / seconds["total"] / 1e9
        table.add_row(name, *halves, f"{1e3 * seconds['total']:.1f}", f"{ratio:.2f}x", f"{bandwidth:.1f}")
    return table


def main() -> int:
    args = parse_arguments()
    results = summarize(run_ranks(Plan(args.world_size, args.threads), work, args))
    bucket_bytes = 4 * numel_of_bucket(args)
    Console().print(make_table(results, bucket_bytes, args))
    if args.out:
        facts = {"bucket_bytes": bucket_bytes, "world_size": args.world_size, "seconds": results}
        write_report(args.out, "bench.collectives", facts)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--mb", type=float, default=64, help="size of the bucket in millions of bytes")
    parser.add_argument("--turns", type=int, default=30, help="turns of every method, after two that do not count")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a rank")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS), metavar="TRANSPORT")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
