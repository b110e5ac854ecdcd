"""Peak memory of a rank, in bytes a parameter: zeroopt's stages against DistributedDataParallel.

    python -m bench.memory --world-size 2

Every method trains the same GPT with AdamW in float32, in processes of its own. While they wrap it and train, this process
asks the kernel every few milliseconds what they hold. A page of memory that k ranks share counts 1/k in each of them, so that
over all ranks it counts once. Mapped files do not count: they are the code of libraries, which ranks share with whatever else
runs. Figures are above what the ranks held after a rehearsal, a step of a tiny model by the same method, for torch loads much
of itself only then.

    a rank         the most that all ranks held at one moment, by their number: the figure to compare
    largest rank   the most that any one rank held at any moment

What is freed counts for as long as the C library keeps it. "SGD alone" shows what no method can do without: it trains without
communication and optimizer state, so it holds parameters, gradients and activations.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.launch import Plan, running_ranks, write_report
from bench.model import count_parameters, make_model
from bench.steps import VOCABULARY, Wrapped, alone, ddp, zero
from bench.watch import Watch, above_first, held_bytes


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), fused=True)


METHODS: dict[str, Callable[[nn.Module], Wrapped]] = {
    "SGD alone": lambda net: alone(net, torch.optim.SGD(net.parameters())),
    "DDP": lambda net: ddp(net, adamw(net)),
    "stage 1": lambda net: zero(stage=1)(net, adamw(net)),
    "stage 2": lambda net: zero(stage=2)(net, adamw(net)),
    "stage 2, share_parameters": lambda net: zero(stage=2, share_parameters=True)(net, adamw(net)),
}


def work(method: str, args: argparse.Namespace, watch: Watch) -> None:
    """What every rank does."""
    wrap = METHODS[method]
    train(wrap, make_model(64, 16, 1, 64), 64, 16, steps=1)
    gc.collect()
    watch.begin()
    net = make_model(VOCABULARY, args.tokens, args.layers, args.width)
    trained = train(wrap, net, VOCABULARY, args.tokens, args.steps)
    watch.end()
    del trained


def train(
    wrap: Callable[[nn.Module], Wrapped], net: nn.Module, vocabulary: int, num_tokens: int, steps: int
) -> Wrapped:
    model, optimizer = wrap(net)
    tokens = torch.randint(vocabulary, (1, num_tokens + 1))
    for _ in range(steps):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    return model, optimizer


@dataclass
class Peak:
    """Bytes above those of the rehearsal.

    Attributes:
        together: the most that all ranks held at one moment.
        of_rank: the most that each rank held at any moment.
        samples: how many moments.
    """

    parameters: int
    together: int
    of_rank: list[int]
    samples: int

    @property
    def a_rank(self) -> float:
        """Bytes a parameter."""
        return self.together / len(self.of_rank) / self.parameters

    @property
    def largest_rank(self) -> float:
        """Bytes a parameter."""
        return max(self.of_rank) / self.parameters


def measure(method: str, args: argparse.Namespace) -> Peak:
    watch = Watch()
    with running_ranks(Plan(args.world_size, args.threads), work, method, args, watch) as ranks:
        moments = watch.moments(ranks, args.interval, held_bytes)
        ranks.values()
    above = above_first(moments)
    of_rank = [max(held) for held in zip(*above, strict=True)]
    parameters = count_parameters(VOCABULARY, args.tokens, args.layers, args.width)
    return Peak(parameters, max(map(sum, above)), of_rank, len(moments))


def make_table(peaks: dict[str, Peak], args: argparse.Namespace) -> Table:
    parameters = next(iter(peaks.values())).parameters
    table = Table(
        title=f"{parameters / 1e6:.1f} M parameters, {args.world_size} ranks, {args.tokens} tokens a rank",
        caption="bytes a parameter, at the peak",
        box=box.SIMPLE,
    )
    table.add_column("method", no_wrap=True)
    for heading in ("a rank", "largest\nrank", "of DDP's"):
        table.add_column(heading, justify="right", no_wrap=True)
    baseline = peaks.get("DDP")
    for method, peak in peaks.items():
        ratio = "" if baseline is None else f"{peak.a_rank / baseline.a_rank:.2f}"
        table.add_row(method, f"{peak.a_rank:.2f}", f"{peak.largest_rank:.2f}", ratio)
    return table


def report(peaks: dict[str, Peak], world_size: int) -> dict[str, object]:
    results = {
        method: {**vars(peak), "bytes_a_parameter": peak.a_rank, "bytes_a_parameter_of_largest_rank": peak.largest_rank}
        for method, peak in peaks.items()
    }
    return {"world_size": world_size, "results": results}


def main() -> int:
    args = parse_arguments()
    peaks = {method: measure(method, args) for method in args.methods}
    Console().print(make_table(peaks, args))
    if args.out:
        write_report(args.out, "bench.memory", report(peaks, args.world_size))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a rank")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=128, help="tokens a rank and step")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--interval", type=float, default=0.01, help="seconds between two looks at the ranks")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
