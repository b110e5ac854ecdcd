"""The command: rows by link and method, a table for each link, and what `--out` and `--plot` ask for."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

import bench.network
from bench.launch import RankFailed, write_report
from bench.model import count_parameters
from bench.network.hosts import Hosts, NoHosts, connected_hosts
from bench.network.link import Link
from bench.network.methods import METHODS
from bench.network.plot import draw
from bench.network.rank import VOCABULARY, Setting, train
from bench.network.results import Row, make_table, row_of

TABLE_WIDTH = 130  # characters
SMOKE = Setting(2, 1, tokens=8, layers=1, width=64, steps=1, windows=1)


def main() -> int:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # namespaces go when this unwinds
    setting = SMOKE if args.smoke else setting_of(args)
    parameters = count_parameters(VOCABULARY, setting.tokens, setting.layers, setting.width)
    console = Console(width=max(TABLE_WIDTH, Console().width))
    rows: list[Row] = []
    try:
        for link in args.links:
            measured = measure(link, setting, args.methods, args.timeout_s)
            console.print(make_table(measured, link, setting, parameters))
            rows += measured
    except NoHosts as reason:
        print(f"bench.network: there can be no hosts here: {reason}")
        return 0 if args.smoke else 1
    if args.out:
        facts = {"parameters": parameters, "setting": asdict(setting), "rows": [asdict(row) for row in rows]}
        write_report(args.out, "bench.network", facts)
    if args.plot:
        draw(rows, setting, parameters, args.plot)
    return 0


def measure(link: Link, setting: Setting, methods: Sequence[str], timeout_s: float) -> list[Row]:
    """All methods on one link.

    Raises:
        NoHosts: this machine permits none.
    """
    with connected_hosts(setting.num_hosts, setting.ranks_a_host, link) as hosts:
        return [measure_method(hosts, method, link, setting, timeout_s) for method in methods]


def measure_method(hosts: Hosts, method: str, link: Link, setting: Setting, timeout_s: float) -> Row:
    try:
        row = row_of(method, link, hosts.run(train, method, setting, timeout_s=timeout_s))
    except RankFailed as error:
        print(f"{method}: {error}", file=sys.stderr)
        return Row(method, str(link), problem=error.reason)
    print(f"{link}, {method}: {row.step_s:.3f} s a step, {(row.sent or 0) / 1e6:.1f} MB sent", file=sys.stderr)
    return row


def setting_of(args: argparse.Namespace) -> Setting:
    return Setting(args.hosts, args.ranks, args.tokens, args.layers, args.width, args.steps, args.windows)


def chosen_methods(parts: Sequence[str] | None) -> list[str]:
    """Those that are named, or whose name contains what is no name of another."""
    if parts is None:
        return list(METHODS)
    return [name for name in METHODS if any(part == name if part in METHODS else part in name for part in parts)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.network",
        description=bench.network.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--links", nargs="+", type=Link.parse, metavar="LINK", help="1gbit 100mbit 100mbit+10ms by default"
    )
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="of each host")
    parser.add_argument("--tokens", type=int, default=256, help="of a rank and step")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, default=4, help="of a window; the figures are medians over windows")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="names, or parts of them")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="of one method")
    parser.add_argument("--smoke", action="store_true", help="next to nothing to do, to see that it works")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--plot", type=Path, help="draw them here, as PNG")
    args = parser.parse_args()
    args.methods = chosen_methods(args.methods)
    if not args.methods:
        parser.error(f"expected --methods to be among {', '.join(METHODS)}")
    args.links = args.links or [Link(1e9), *((Link(1e9, 0.001),) if args.smoke else (Link(1e8), Link(1e8, 0.01)))]
    return args


if __name__ == "__main__":
    sys.exit(main())
