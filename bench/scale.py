"""Predictions, and nothing else: a step of large models on thousands of GPUs, as the simulator has it.

    python -m bench.scale --out runs/scale.json --plots docs/images

Servers of 8 H100s with 400 Gb/s each (`zeroopt.simulator.machine.H100`), bfloat16 parameters and gradients, float32 masters and moments, 8,192
tokens a GPU and step. None of these machines was there: `python -m bench.simulator` says how far the simulator was off where it could be
compared. A model that no GPU could hold with ZeRO-2 is cut into 8 parts within each server (tensor parallel), and what is simulated is
the data-parallel training of one part, with its eighth of the server's link.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.launch import write_report
from bench.scale_plots import draw_by_bucket, draw_by_ranks
from zeroopt.planner.transformer import transformer_of
from zeroopt.simulator.machine import H100, Machine
from zeroopt.simulator.simulate import Simulated, Simulator

TOKENS = 2048
SEQUENCES = 4  # a GPU
RANKS = (8, 64, 512, 1024, 4096, 10_000)
BUCKETS_MB = (25, 100, 400)
DDP_BUCKET_MB = 25


@dataclass(frozen=True)
class Model:
    """A transformer of some size.

    Attributes:
        parts: into which it is cut within a server.
    """

    parameters: float
    parts: int = 1

    def simulator(self) -> Simulator:
        model = transformer_of(self.parameters / self.parts, checkpointed=True)
        return Simulator(model, torch.optim.AdamW, tokens=TOKENS, batch=SEQUENCES * self.parts, device="cuda")

    def machine(self) -> Machine:
        """As the ranks of one part see it."""
        return replace(
            H100, host_ranks=H100.host_ranks // self.parts, network_bandwidth=H100.network_bandwidth / self.parts
        )


MODELS = {"1.5 B": Model(1.5e9), "17 B": Model(17e9), "170 B in 8 parts": Model(170e9, parts=8)}

METHODS: dict[str, dict[str, Any]] = {
    "DDP": {"method": "DDP"},
    "FSDP2": {"method": "FSDP2"},
    "ZeRO-1, flat ring": {"stage": 1, "collectives": "ring"},
    "ZeRO-2, flat ring": {"stage": 2, "collectives": "ring"},
    "ZeRO-2, two levels": {"stage": 2, "collectives": "two levels"},
    "ZeRO-2, three levels": {"stage": 2, "collectives": "three levels"},
}


@dataclass(frozen=True)
class Row:
    """A prediction. bucket_mb: of zeroopt's; DDP has 25, FSDP2 here what zeroopt's buckets hold."""

    model: str
    gpus: int
    method: str
    bucket_mb: int
    step: Simulated


def predict(models: Sequence[str], gpus: Sequence[int], buckets_mb: Sequence[int]) -> list[Row]:
    rows = []
    for name in models:
        model = MODELS[name]
        simulator, machine = model.simulator(), model.machine()
        for number, bucket_mb in places(gpus, buckets_mb):
            for method, asked in METHODS.items():
                options: dict[str, Any] = {
                    "param_dtype": torch.bfloat16,
                    "bucket_mb": DDP_BUCKET_MB if method == "DDP" else bucket_mb,
                }
                step = simulator.run(machine, number // model.parts, **options, **asked)
                rows.append(Row(name, number, method, bucket_mb, step))
    return rows


def places(gpus: Sequence[int], buckets_mb: Sequence[int]) -> list[tuple[int, int]]:
    """Numbers of GPUs with the smallest buckets, and the most GPUs with all."""
    return [(number, min(buckets_mb)) for number in gpus] + [
        (max(gpus), bucket_mb) for bucket_mb in buckets_mb if bucket_mb != min(buckets_mb)
    ]


def make_table(rows: Sequence[Row], model: str, bucket_mb: int) -> Table:
    chosen = {(row.method, row.gpus): row.step for row in rows if (row.model, row.bucket_mb) == (model, bucket_mb)}
    gpus = sorted({number for _, number in chosen})
    table = Table(
        title=f"{model}, buckets of {bucket_mb} MiB: ms a step (of the time of its arithmetic)", box=box.SIMPLE
    )
    table.add_column("method", no_wrap=True)
    for number in gpus:
        table.add_column(f"{number:,} GPUs", justify="right", no_wrap=True)
    for method in METHODS:
        steps = [chosen[method, number] for number in gpus]
        table.add_row(method, *(f"{1e3 * step.step_s:.0f} ({step.step_s / step.compute_s:.2f})" for step in steps))
    return table


def main() -> int:
    args = parse_arguments()
    rows = predict(args.models, args.gpus, args.buckets_mb)
    console = Console(width=max(130, Console().width))
    for model in args.models:
        for bucket_mb in args.buckets_mb:
            console.print(make_table(rows, model, bucket_mb))
    if args.out:
        facts: dict[str, object] = {"machine_described": asdict(H100), "rows": [asdict(row) for row in rows]}
        write_report(args.out, "bench.scale", facts)
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        draw_by_ranks(rows, args.plots / "scale-by-ranks.png")
        draw_by_bucket(rows, args.plots / "scale-by-bucket.png")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(RANKS), help="multiples of 8")
    parser.add_argument("--buckets-mb", type=int, nargs="+", default=list(BUCKETS_MB))
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--plots", type=Path, help="draw them into this folder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
