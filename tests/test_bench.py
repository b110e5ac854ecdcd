"""The benchmarks run and write what they measure. What they measure is not tested: that would depend on the machine."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import sys
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen, run
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY_MODEL = ("--layers=1", "--width=64", "--tokens=16")


def run_bench(module: str, *options: str) -> CompletedProcess[str]:
    command = [sys.executable, "-m", f"bench.{module}", *options]
    return run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def report_of(tmp_path: Path, module: str, *options: str) -> dict[str, Any]:
    path = tmp_path / "new_folder" / "report.json"
    outcome = run_bench(module, *options, f"--out={path}")
    assert outcome.returncode == 0, outcome.stderr
    report = json.loads(path.read_text())
    assert report["command"].startswith(f"python -m bench.{module} --")
    assert report["machine"]["torch"]
    return report


def test_steps(tmp_path: Path) -> None:
    report = report_of(tmp_path, "steps", *TINY_MODEL, "--rounds=1", "--steps=1")
    assert report["parameters"] > 1e6
    assert {"no communication", "DDP", "stage 2"} <= report["results"].keys()
    for figures in report["results"].values():
        assert figures.keys() == {"step_s", "optimizer_s", "cpu_s"}


def test_collectives(tmp_path: Path) -> None:
    report = report_of(tmp_path, "collectives", "--world-size=4", "--mb=1", "--turns=1")
    assert (report["world_size"], report["bucket_bytes"]) == (4, 10**6)
    halves = {"reduce_scatter", "all_gather", "total"}
    transports = dict.fromkeys(("torch", "pairwise", "shm", "shm, share_parameters", "hybrid"), halves)
    assert {name: seconds.keys() for name, seconds in report["seconds"].items()} == {
        "all_reduce": {"total"},
        **transports,
    }


def test_memory(tmp_path: Path) -> None:
    method = "stage 2, share_parameters"
    report = report_of(tmp_path, "memory", *TINY_MODEL, "--steps=1", "--methods", method)
    assert report["world_size"] == 2
    assert report["results"].keys() == {method}
    peak = report["results"][method]
    assert peak["parameters"] > 1e6
    assert peak["samples"] > 1
    assert 0 < peak["together"] <= sum(peak["of_rank"])
    assert peak["bytes_a_parameter"] == peak["together"] / 2 / peak["parameters"]


def test_kernels(tmp_path: Path) -> None:
    report = report_of(tmp_path, "kernels", "--gib=0.001", "--rounds=2", "--threads=1")
    assert len(report["rows"]) > 20
    for row in report["rows"]:
        assert row["threads"] == 1
        assert row["bytes"] > 0
        assert "the same traffic" in row["others"]
    by_name = {row["name"]: row for row in report["rows"]}
    assert {"torch fused", "torch default"} <= by_name["AdamW, one tensor"]["others"].keys()


READ_ALL = "import mmap; pages = mmap.mmap({fd}, 0); sum(pages[::4096]); print('read', flush=True); input()"


def test_memory_counts_a_shared_page_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    held_bytes = importlib.import_module("bench.watch").held_bytes
    num_bytes, slack = 64 * 2**20, 4 * 2**20
    with open(os.memfd_create("shared"), "r+b") as file:
        file.truncate(num_bytes)
        before = held_bytes(os.getpid())
        with mmap.mmap(file.fileno(), 0) as pages:
            for start in range(0, num_bytes, 4096):
                pages[start] = 1
            assert held_bytes(os.getpid()) - before == pytest.approx(num_bytes, abs=slack)
            command = [sys.executable, "-c", READ_ALL.format(fd=file.fileno())]
            with Popen(command, pass_fds=[file.fileno()], stdin=PIPE, stdout=PIPE) as peer:
                assert peer.stdout is not None
                assert peer.stdout.readline() == b"read\n"
                assert held_bytes(os.getpid()) - before == pytest.approx(num_bytes / 2, abs=slack)
                assert held_bytes(peer.pid) == pytest.approx(num_bytes / 2, abs=4 * slack)
                peer.communicate(b"\n")


def test_a_failing_rank_ends_the_command() -> None:
    outcome = run_bench("memory", "--width=32", "--methods=DDP")  # no heads
    assert outcome.returncode != 0
    assert "ZeroDivisionError" in outcome.stderr
