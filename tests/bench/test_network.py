"""Hosts and links that `bench.network` makes, and what it counts on them."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.network.link import Link
from bench.network.rank import Window, read_counters
from bench.network.relay import Delivery
from bench.network.results import link_s, row_of


@pytest.mark.parametrize(
    ("text", "link", "shown"),
    [
        ("1gbit", Link(1e9), "1 Gb/s"),
        ("100mbit+10ms", Link(1e8, 0.01), "100 Mb/s, 10 ms"),
        ("2.5gbit+0.5ms", Link(2.5e9, 0.0005), "2.5 Gb/s, 0.5 ms"),
    ],
)
def test_a_link_is_read_and_shown(text: str, link: Link, shown: str) -> None:
    assert (Link.parse(text), str(link)) == (link, shown)
    assert link.seconds(link.bits_a_second / 8) == 1


@pytest.mark.parametrize("text", ["", "1", "gbit", "1gbit+", "1gbit 10ms"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a link such as 1gbit"):
        Link.parse(text)


COUNTERS = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:      11       1    0    0    0     0          0         0       12       1    0    0    0     0       0          0
 link0:    1024      10    0    0    0     0          0         0     2048      20    0    0    0     0       0          0
"""


def test_bytes_are_read_from_the_device_of_that_name() -> None:
    assert read_counters(COUNTERS, "link0") == (2048, 1024)
    with pytest.raises(ValueError, match="no network device 'link'"):
        read_counters(COUNTERS, "link")


def test_packets_arrive_in_turn_and_no_faster_than_the_link() -> None:
    arrivals, device = os.pipe()
    delivery = Delivery(device, bits_a_second=8000)  # a byte a millisecond
    delivery.take(b"a" * 10, earliest=1.0)
    delivery.take(b"b" * 20, earliest=1.0)
    delivery.take(b"c" * 5, earliest=2.0)
    assert delivery.next_at == pytest.approx(1.010)
    delivery.deliver(1.02)
    assert os.read(arrivals, 100) == b"a" * 10
    assert delivery.next_at == pytest.approx(1.030)
    delivery.deliver(2.1)
    assert os.read(arrivals, 100) == b"b" * 20 + b"c" * 5
    assert delivery.next_at == float("inf")
    os.close(arrivals)
    os.close(device)


def test_a_row_is_of_the_slowest_rank_in_the_median_window() -> None:
    first = [Window(1.0, 100, 50, 0.1, 3.0), Window(5.0, 100, 50, 0.1, 2.0), Window(2.0, 100, 50, 0.1, 1.0)]
    second = [Window(1.5, 90, 60, 0.2, 3.0), Window(2.0, 90, 60, 0.2, 2.0), Window(3.0, 90, 60, 0.2, 2.0)]
    row = row_of("a method", Link(8e2), [first, second])
    assert (row.step_s, row.sent, row.received, row.loss) == (3.0, 100, 60, 1.5)
    assert row.cpu_s == pytest.approx(0.3)
    assert link_s(row, Link(8e2)) == 1.0


def run_network(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["network", *options])
    status: int = importlib.import_module("bench.network.__main__").main()
    return status


@pytest.mark.slow
def test_a_step_between_two_hosts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On links with and without a delay; nothing but the bucket's halves crosses them, and losses are those of DDP."""
    out, plot = tmp_path / "network.json", tmp_path / "network.png"
    methods = ("no communication", "DDP", "zeroopt stage 2")
    assert run_network(monkeypatch, "--smoke", f"--out={out}", f"--plot={plot}", "--methods", *methods) == 0
    shown = capsys.readouterr()
    if "there can be no hosts here" in shown.out:
        pytest.skip(shown.out)
    report: dict[str, Any] = json.loads(out.read_text())
    rows = report["rows"]
    assert [(row["link"], row["method"]) for row in rows] == [
        (link, method) for link in ("1 Gb/s", "1 Gb/s, 1 ms") for method in methods
    ]
    for row in rows:
        assert row["problem"] is None, shown.err
        moved = 0 if row["method"] == "no communication" else 4 * report["parameters"]
        assert moved <= row["sent"] <= 1.1 * moved + 1e4
        assert moved <= row["received"] <= 1.1 * moved + 1e4
    losses = {row["method"]: row["loss"] for row in rows}
    assert losses["zeroopt stage 2"] == pytest.approx(losses["DDP"], rel=1e-5)
    assert plot.stat().st_size > 0


def test_where_there_can_be_no_hosts_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run_network(monkeypatch, "--smoke") == 0
    assert "there can be no hosts here: network namespaces need" in capsys.readouterr().out
    assert run_network(monkeypatch, "--methods", "DDP") == 1
