"""What the simulator says of a step beside what it takes, on this machine and between hosts with slow links.

    python -m bench.simulator
    python -m bench.simulator --world-sizes 2 4 8 16 --links 1gbit 100mbit

The machine's numbers are measured first, as `python -m zeroopt simulate --measure` does; no number is fitted to the steps. Then ranks train
by some methods of `bench.network`, on this machine alone and on two hosts of two ranks. Prints a table; --out writes the figures as JSON.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.launch import Plan, RankFailed, run_ranks, write_report
from bench.model import make_model
from bench.network.hosts import NoHosts, connected_hosts
from bench.network.link import Link
from bench.network.methods import ALONE, DDP
from bench.network.rank import VOCABULARY, Setting, Window, train
from bench.network.results import row_of
from zeroopt.simulator import Machine
from zeroopt.simulator.measure import measure
from zeroopt.simulator.simulate import Simulated, Simulator

METHODS: dict[str, dict[str, Any]] = {
    ALONE: {"stage": 0, "collectives": "single"},
    DDP: {"method": "DDP"},
    "zeroopt stage 1": {"stage": 1},
    "zeroopt stage 2": {"stage": 2},
    "zeroopt stage 2, pairwise": {"stage": 2, "transport": "pairwise"},
    "zeroopt stage 2, bfloat16 gradients": {"stage": 2, "reduce_dtype": torch.bfloat16},
}
"""Methods of `bench.network`, and the same for `Simulator.run`."""

HERE = "this machine"
LATENCY_S = 1e-4  # of a link without a delay, which is a switch in the kernel
TIMEOUT_S = 200.0


@dataclass(frozen=True)
class Row:
    """A method's step in seconds, and the bytes that leave a host in it; nothing of what has failed."""

    where: str
    ranks: int
    method: str
    simulated_s: float
    measured_s: float | None
    simulated_bytes: float
    measured_bytes: float | None

    @property
    def error(self) -> float | None:
        """Of the simulated step, as a part of the measured one."""
        return None if self.measured_s is None else self.simulated_s / self.measured_s - 1


def rows_here(args: argparse.Namespace, machine: Machine, simulator: Simulator) -> Iterator[Row]:
    for world_size in args.world_sizes:
        for method in args.methods:
            setting = setting_of(args, 1, world_size)
            simulated = simulator.run(machine.with_host_ranks(world_size), world_size, **METHODS[method])
            try:
                windows = run_ranks(Plan(world_size, 1, timeout_s=TIMEOUT_S), train_here, method, setting)
            except RankFailed as error:
                print(f"{method}: {error}", file=sys.stderr)
                windows = None
            yield row(HERE, method, Link(float("inf")), simulated, windows, machine)


def train_here(method: str, setting: Setting) -> list[Window]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whose bytes are counted
    return train(method, setting)


def rows_between_hosts(args: argparse.Namespace, machine: Machine, simulator: Simulator, link: Link) -> Iterator[Row]:
    setting = setting_of(args, args.hosts, args.ranks)
    linked = replace(
        machine,
        host_ranks=args.ranks,
        cores=max(1, machine.cores // args.hosts),  # hosts are made of one machine
        network_bandwidth=link.bits_a_second / 8,
        network_latency=LATENCY_S + link.delay_s,
    )
    with connected_hosts(args.hosts, args.ranks, link) as hosts:
        for method in args.methods:
            simulated = simulator.run(linked, setting.world_size, **METHODS[method])
            try:
                windows = hosts.run(train, method, setting, timeout_s=TIMEOUT_S)
            except RankFailed as error:
                print(f"{method}: {error}", file=sys.stderr)
                windows = None
            yield row(str(link), method, link, simulated, windows, linked)


def row(
    where: str, method: str, link: Link, simulated: Simulated, windows: list[list[Window]] | None, machine: Machine
) -> Row:
    measured = None if windows is None else row_of(method, link, windows)
    made = Row(
        where,
        simulated.world_size,
        method,
        simulated.step_s,
        None if measured is None else measured.step_s,
        simulated.network_s * machine.network_bandwidth,
        None if measured is None or where == HERE else measured.sent,
    )
    print(
        f"{where}, {made.ranks} ranks, {method}: {made.simulated_s:.3f} s, measured {made.measured_s} s",
        file=sys.stderr,
    )
    return made


def setting_of(args: argparse.Namespace, num_hosts: int, ranks_a_host: int) -> Setting:
    return Setting(num_hosts, ranks_a_host, args.tokens, args.layers, args.width, args.steps, args.windows)


def make_table(rows: list[Row]) -> Table:
    errors = [abs(row.error) for row in rows if row.error is not None]
    table = Table(
        caption=f"error of the step: {statistics.fmean(errors):.1%} in the mean, {max(errors):.1%} at worst"
        if errors
        else None,
        box=box.SIMPLE,
    )
    for heading in ("where", "ranks", "method", "simulated ms", "measured ms", "error", "simulated MB", "measured MB"):
        table.add_column(heading, justify="left" if heading in ("where", "method") else "right", no_wrap=True)
    for row in rows:
        table.add_row(row.where, str(row.ranks), row.method, *cells_of(row))
    return table


def cells_of(row: Row) -> list[str]:
    if row.measured_s is None or row.error is None:
        return [f"{1e3 * row.simulated_s:.0f}", "failed"]
    cells = [f"{1e3 * row.simulated_s:.0f}", f"{1e3 * row.measured_s:.0f}", f"{row.error:+.1%}"]
    if row.measured_bytes is not None:
        cells += [f"{row.simulated_bytes / 1e6:.1f}", f"{row.measured_bytes / 1e6:.1f}"]
    return cells


def main() -> int:
    args = parse_arguments()
    machine = measure(1, network_bandwidth=1e9 / 8, network_latency=LATENCY_S)
    net = make_model(VOCABULARY, args.tokens, args.layers, args.width)
    sample = [torch.zeros(1, args.tokens, dtype=torch.int64)] * 2
    simulator = Simulator(net, torch.optim.AdamW, sample=sample)
    rows = list(rows_here(args, machine, simulator))
    try:
        for link in args.links:
            rows += rows_between_hosts(args, machine, simulator, link)
    except NoHosts as reason:
        print(f"bench.simulator: there can be no hosts here: {reason}")
    print(machine.as_toml())
    Console(width=max(120, Console().width)).print(make_table(rows))
    if args.out:
        facts: dict[str, object] = {
            "machine_described": asdict(machine),
            "rows": [asdict(row) | {"error": row.error} for row in rows],
        }
        write_report(args.out, "bench.simulator", facts)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-sizes", type=int, nargs="*", default=[2, 4, 8, 16], help="on this machine alone")
    parser.add_argument("--links", type=Link.parse, nargs="*", default=[Link(1e9), Link(1e8)], metavar="LINK")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="of each host")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3, help="of a window")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
