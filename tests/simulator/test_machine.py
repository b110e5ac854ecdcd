"""Machines from files."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from zeroopt import ConfigError
from zeroopt.simulator.machine import H100, Machine, read_machine

NEEDED = {"host_ranks": 2, "flops": 1e9, "memory_bandwidth": 1e9}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
def test_a_machine_is_read_as_it_is_written(tmp_path: Path) -> None:
    machine = replace(H100, cores=3, byte_s=1.25e-10)
    (tmp_path / "machine.toml").write_text(machine.as_toml())
    (tmp_path / "machine.json").write_text(json.dumps(asdict(machine)))
    assert read_machine(tmp_path / "machine.toml") == read_machine(tmp_path / "machine.json") == machine
    assert read_machine("h100") is H100


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"flops": 1.0}, "missing host_ranks, memory_bandwidth"),
        ({**NEEDED, "flop": 1.0}, "unknown flop"),
        ({**NEEDED, "flops": "fast"}, "expected numbers, got flops='fast'"),
        ({**NEEDED, "flops": 0}, "flops to be positive"),
        ({**NEEDED, "noise": -1}, "noise not to be negative"),
    ],
)
def test_what_describes_no_machine_is_refused(tmp_path: Path, given: dict[str, object], message: str) -> None:
    (tmp_path / "machine.json").write_text(json.dumps(given))
    with pytest.raises(ConfigError, match=message):
        read_machine(tmp_path / "machine.json")


def test_a_file_of_something_else_is_told(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="attributes by name, got a list"):
        read_machine(tmp_path / "list.json")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a machine \(h100\) or a file"):
        read_machine(tmp_path / "none.json")


def test_ranks_share_what_cores_there_are() -> None:
    assert [Machine(ranks, 1.0, 1.0, cores=4).crowding for ranks in (2, 4, 8)] == [1, 1, 2]
    assert Machine(8, 1.0, 1.0).crowding == 1
