"""The numbers of the machine at hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from zeroopt.__main__ import main
from zeroopt.simulator.machine import read_machine

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
def test_what_is_measured_describes_a_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("--measure", "--host-ranks", "2", "--network-bits", "8e8", "--network-delay-ms", "5")
    monkeypatch.setattr(sys, "argv", ["zeroopt", "simulate", *arguments])
    assert main() == 0
    (tmp_path / "machine.toml").write_text(capsys.readouterr().out)
    machine = read_machine(tmp_path / "machine.toml")
    assert (machine.host_ranks, machine.network_bandwidth, machine.network_latency) == (2, 1e8, 5e-3)
    assert machine.cores >= 1
    # How large they are, the machine and who else uses it decide.
    measured = (machine.flops, machine.memory_bandwidth, machine.message_s, machine.byte_s, machine.bucket_s)
    assert all(0 < number < float("inf") for number in measured), measured
