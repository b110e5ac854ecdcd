"""The benchmarks run and write what they measure. What they measure is not tested: that would depend on the machine."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen, run
from typing import Any

import pytest
import torch
import torch.distributed as dist
from paths import ROOT
from worker_pool import PRELOADED, WORKER_ENVIRONMENT

pytestmark = pytest.mark.slow

TINY_MODEL = ("--layers=1", "--width=64", "--tokens=16")


RunBench = Callable[..., CompletedProcess[str]]


def run_command(module: str, *options: str, **environment: str) -> CompletedProcess[str]:
    command = [sys.executable, "-m", f"bench.{module}", *options]
    # pytest-benchmark measures nothing where it finds pytest-xdist, by whose variables tests run beside each other.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return run(command, cwd=ROOT, env=outside | environment, capture_output=True, text=True, check=False)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which here starts its ranks from the server that the workers of other tests come from."""
    for name, value in WORKER_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    module = importlib.import_module("bench.launch")
    monkeypatch.setattr(module, "PRELOADED", (*module.PRELOADED, *PRELOADED))
    return module


@pytest.fixture
def run_bench(launch: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> RunBench:
    """As `run_command`, in this process."""

    def run_main(module: str, *options: str) -> CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", [module, *options])
        try:
            status = importlib.import_module(f"bench.{module}").main()
        except SystemExit as end:
            status = end.code
        return CompletedProcess([module, *options], status, *capfd.readouterr())

    return run_main


def report_of(run_bench: RunBench, tmp_path: Path, module: str, *options: str, **environment: str) -> dict[str, Any]:
    path = tmp_path / "new_folder" / "report.json"
    outcome = run_bench(module, *options, f"--out={path}", **environment)
    assert outcome.returncode == 0, outcome.stderr
    report = json.loads(path.read_text())
    assert report["command"].startswith(f"python -m bench.{module.removesuffix('.__main__')} --")
    assert report["machine"]["torch"]
    return report


def test_steps(run_bench: RunBench, tmp_path: Path) -> None:
    methods = ("no communication", "DDP", "stage 2", "stage 2, pairwise")
    report = report_of(run_bench, tmp_path, "steps", *TINY_MODEL, "--rounds=1", "--steps=1", "--methods", *methods)
    assert report["parameters"] > 1e6
    assert tuple(report["results"]) == methods
    for figures in report["results"].values():
        assert figures.keys() == {"step_s", "optimizer_s", "cpu_s"}


def test_collectives(run_bench: RunBench, tmp_path: Path) -> None:
    report = report_of(run_bench, tmp_path, "collectives", "--world-size=4", "--mb=1", "--turns=1")
    assert (report["world_size"], report["bucket_bytes"]) == (4, 10**6)
    halves = {"reduce_scatter", "all_gather", "total"}
    transports = dict.fromkeys(
        ("torch", "all_to_all", "pairwise", "tree", "shm", "shm, share_parameters", "hybrid"), halves
    )
    assert {name: seconds.keys() for name, seconds in report["seconds"].items()} == {
        "all_reduce": {"total"},
        **transports,
    }


def test_ranks(run_bench: RunBench, tmp_path: Path) -> None:
    report = report_of(run_bench, tmp_path, "ranks", "--world-sizes", "3", "--layers=2", "--steps=2")
    assert report["results"].keys() == {"3"}
    mapped = {method: figures["mapped"] for method, figures in report["results"]["3"].items()}
    assert mapped == {"DDP": 0, "shm": 1 + 3, "pairwise": 0}  # the board, and a piece of each rank


def test_quality(run_bench: RunBench, tmp_path: Path) -> None:
    methods = ("--methods", "stage 2", "average every 16", "--world-size=2", "--steps=17", "--seeds", "0", "1")
    results = report_of(run_bench, tmp_path, "quality.__main__", "--tasks", "characters", *methods)["results"]
    baseline, same, averaged = (results["characters"][name] for name in ("DDP", "stage 2", "average every 16"))
    assert all(1.0 < loss < 3.0 for loss in baseline["losses"])
    assert same["losses"] == pytest.approx(baseline["losses"], rel=1e-5)  # of the same start and batches
    assert averaged["losses"] != pytest.approx(baseline["losses"], rel=1e-5)
    assert baseline["spread"] == max(baseline["losses"]) - min(baseline["losses"]) > 0
    assert averaged["difference"] == pytest.approx((sum(averaged["losses"]) - sum(baseline["losses"])) / 2)


def test_memory(run_bench: RunBench, tmp_path: Path) -> None:
    options = ("--models=gpt-tiny", "--steps=2", "--methods", "SGD alone", "stage 2, shared")
    alone, shared = report_of(run_bench, tmp_path, "memory.__main__", *options)["rows"]
    assert (alone["case"]["method"], alone["case"]["world_size"]) == ("SGD alone", 1)
    assert (shared["case"]["method"], shared["case"]["world_size"]) == ("stage 2, shared", 2)
    for row in (alone, shared):
        assert row["problem"] is None
        assert row["parameters"] == 2 * 1024 * 64 + 16 * 64 + 12 * 64**2 + 13 * 64 + 2 * 64
        assert row["samples"] > 1
        assert row["peak"] == row["peaks"][row["peak_phase"]]
        assert 0 < row["held"] <= row["peak"]
    assert (alone["formula"], shared["formula"]) == (8, 8)


def test_memory_says_what_is_missing(run_bench: RunBench, monkeypatch: pytest.MonkeyPatch) -> None:
    models = importlib.import_module("bench.memory.models")
    monkeypatch.setattr(models, "find_spec", lambda module: None)
    outcome = run_bench("memory.__main__", "--models=gpt2-82m", "--methods=DDP")
    assert outcome.returncode == 0, outcome.stderr
    assert "not installed: transformers" in outcome.stdout


def test_memory_by_phase() -> None:
    measure = importlib.import_module("bench.memory.measure")
    moments = [(1.0, [5, 5]), (2.0, [10, 7]), (3.0, [30, 5]), (4.0, [20, 25]), (5.0, [6, 7])]
    phases = [(1.5, "build"), (2.5, "wrap"), (4.5, "later steps")]
    assert measure.most_by_phase(moments, phases) == {"build": 3.5, "wrap": 17.5, "later steps": 1.5}


def test_checkpoint(run_bench: RunBench, tmp_path: Path) -> None:
    methods = ("(the files alone)", "stage 2, async_save")
    options = (*TINY_MODEL, "--rounds=1", f"--dir={tmp_path / 'files'}", "--methods", *methods)
    report = report_of(run_bench, tmp_path, "checkpoint", *options)
    assert (report["world_size"], tuple(report["results"])) == (2, methods)
    for figures in report["results"].values():
        assert figures["right"] is True
        assert figures["disk"] >= 12 * report["parameters"]
        assert 0 < figures["stall_s"] <= figures["save_s"]
        assert all(len(turn["save"]["peak"]) == 2 for turn in figures["turns"])
    assert not list((tmp_path / "files").iterdir())


def test_checkpoint_tells_what_was_not_loaded() -> None:
    checksums = importlib.import_module("bench.checkpoint").checksums
    state = {0: {"step": torch.tensor(2.0), "exp_avg": torch.arange(4.0)}}
    assert checksums(state) == checksums({0: {name: value.clone() for name, value in state[0].items()}})
    for changed in ({"step": torch.tensor(1.0)}, {"exp_avg": torch.arange(4.0).flip(0)}, {"more": 1}):
        assert checksums({0: {**state[0], **changed}}) != checksums(state)


def test_kernels(tmp_path: Path) -> None:
    """One of each kind: `make bench-smoke` runs all."""
    some = (
        "AdamW, one tensor",
        "Lion",
        "LAMB",
        "norm and",
        "pack float32 to",
        "reduce",
        "quantize uint8",
        "wire, int4",
    )
    report = report_of(
        *(run_command, tmp_path, "kernels", "--gib=0.001", "--rounds=2", "--threads=1", "--only", *some),
        TORCH_EXTENSIONS_DIR=str(tmp_path / "nothing_compiled"),  # else DeepSpeed is imported
    )
    assert len(report["rows"]) == len(some)
    for row in report["rows"]:
        assert row["threads"] == 1
        assert row["bytes"] > 0
        assert "the same traffic" in row["others"]
    by_name = {row["name"]: row for row in report["rows"]}
    assert {"torch fused", "torch default"} <= by_name["AdamW, one tensor"]["others"].keys()


READ_ALL = "import mmap; pages = mmap.mmap({fd}, 0); sum(pages[::4096]); print('read', flush=True); input()"


def test_memory_counts_a_shared_page_once() -> None:
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
    outcome = run_command("steps", "--width=32", "--methods=DDP")  # no heads
    assert outcome.returncode != 0
    assert "ZeroDivisionError" in outcome.stderr


def end_on_one_rank(how: str) -> None:
    """Of two, while the other waits for it."""
    if dist.get_rank() == 1:
        if how == "raise":
            raise TypeError("first line\nsecond line")
        if how == "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            sys.exit(3)
        time.sleep(600)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "reason", "timeout_s"),
    [
        ("raise", "TypeError: first line", 240),
        ("be killed", "rank 1 was killed by SIGKILL", 240),
        ("exit", "SystemExit: 3", 240),
        ("hang", "stopped after 2 s", 2),
    ],
)
def test_a_rank_that_fails_is_told(launch: Any, how: str, reason: str, timeout_s: float) -> None:
    plan = launch.Plan(world_size=2, threads=1, timeout_s=timeout_s)
    with (
        pytest.raises(launch.RankFailed) as failure,
        launch.running_ranks(plan, end_on_one_rank, how) as ranks,
    ):
        ranks.values()
    assert failure.value.reason == reason
    assert not any(process.is_alive() for process in ranks.processes)


def facts_of_a_rank(padding: int) -> tuple[int, int, set[str], bytes]:
    outputs = {str(Path(f"/proc/self/fd/{descriptor}").readlink()) for descriptor in (1, 2)}
    return os.getpid(), torch.get_num_threads(), outputs, bytes(padding)


def test_ranks_return_values(launch: Any) -> None:
    plan = launch.Plan(world_size=2, threads=1, quiet=True)
    with launch.running_ranks(plan, facts_of_a_rank, 10**6) as ranks:
        assert ranks.values() == [(pid, 1, {os.devnull}, bytes(10**6)) for pid in ranks.pids]


def children_of(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def runs(pid: int) -> bool:
    """Unlike a zombie."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def test_ranks_end_with_who_has_started_them() -> None:
    options = ("--models=gpt-34m", "--steps=100000", "--methods", "DDP")
    command = [sys.executable, "-m", "bench.memory", *options]
    with Popen(command, cwd=ROOT, start_new_session=True) as parent:
        ranks: list[int] = []
        while len(ranks) < 2:  # children of the server
            assert parent.poll() is None
            time.sleep(0.1)
            ranks = [rank for child in children_of(parent.pid) for rank in children_of(child)]
        parent.kill()
    while any(map(runs, ranks)):  # until the test's own timeout
        time.sleep(0.1)


def compare_to(run_bench: RunBench, path: Path, *options: str) -> CompletedProcess[str]:
    shape = ("--model=tiny", "--vocabulary=256", "--tokens=8", "--rounds=1", f"--out={path}")
    return run_bench("compare.__main__", *shape, *options)


def test_compare(run_bench: RunBench, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    names = ["no communication", "DDP, bucket views, fused AdamW", "zeroopt stage 2, share_parameters"]
    outcome = compare_to(run_command, path, "--steps=2", "--accumulation=2", "--methods", *names)
    assert outcome.returncode == 0, outcome.stderr
    report = json.loads(path.read_text())
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == names
    for row in rows.values():
        assert row["problem"] is None
        assert row["wrong"] is None
        assert row["step_s"]["median"] > 0
        assert row["pss_bytes"] > 0
        assert row["cpu_s"] > 0
    alone, ddp, shared = rows.values()
    gradient_bytes = 4 * (2 * 256 * 64 + 8 * 64 + 12 * 64**2 + 6 * 64)
    assert ddp["sent_bytes"] == pytest.approx(gradient_bytes, rel=0.1)  # 2 (N - 1)/N of them
    assert shared["sent_bytes"] < gradient_bytes / 10
    assert abs(alone["losses"][-1] - ddp["losses"][-1]) > 1e-2  # so the check of losses can tell
    assert {range["name"] for range in report["runs"][1]["ranks"][0]["ranges"]} >= {"forward", "backward", "step"}
    pictures = {"time-0.png", "memory-0.png", "timeline-0.png"}
    assert {entry.name for entry in tmp_path.iterdir()} == {"results.json", "report.md", *pictures}

    for name in pictures:
        (tmp_path / name).unlink()
    before = (tmp_path / "report.md").read_text()
    outcome = run_bench("report", str(path))
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "report.md").read_text() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"results.json", "report.md", *pictures}


def test_compare_says_what_is_missing(run_bench: RunBench, tmp_path: Path) -> None:
    outcome = compare_to(run_bench, tmp_path / "results.json", "--methods", "8-bit moments", "remainders", "--steps=1")
    assert outcome.returncode == 0, outcome.stderr
    assert "| zeroopt stage 2, remainders: needs --precision bfloat16 |" in (tmp_path / "report.md").read_text()


def test_compare_refuses_unknown_names(run_bench: RunBench) -> None:
    outcome = run_bench("compare.__main__", "--methods=no such thing")
    assert outcome.returncode == 2
    assert "no method's name contains no such thing; there are: no communication; DDP" in outcome.stderr
    outcome = run_bench("compare.__main__", "--model=huge")
    assert outcome.returncode == 2
    assert "expected a model among tiny, gpt-10m" in outcome.stderr


@pytest.fixture
def compare_modules() -> dict[str, Any]:
    names = ("budget", "launch", "methods", "network", "rank", "setting", "summary", "sweep")
    return {name: importlib.import_module(f"bench.compare.{name}") for name in names}


def made_up_run(modules: dict[str, Any], method: str, losses: list[float], step_s: float = 0.1) -> Any:
    setting = modules["setting"].Setting(1, 64, 64, 8, 1, "float32", None, 2, 1, "cpu")
    bandwidth = importlib.import_module("bench.compare.bandwidth").Bandwidth(optimizer=28e6, copy=4e6)
    figures = modules["rank"].Figures(
        wrap_s=0.5,
        forward_backward_s=[step_s, 3 * step_s],
        optimizer_s=[step_s, step_s],
        cpu_s=1.0,
        sent_bytes=100,
        losses=losses,
        resident_bytes=10,
        device_bytes=None,
        bandwidth=bandwidth if method == "no communication" else None,
        ranges=[],
    )
    return modules["launch"].Run(method, setting, None, [figures, figures], together=1000, samples=3)


def test_compare_marks_wrong_losses(compare_modules: dict[str, Any]) -> None:
    ddp = compare_modules["methods"].DDP
    runs = [
        made_up_run(compare_modules, "zeroopt stage 1", [5.0, 4.0021]),
        made_up_run(compare_modules, "zeroopt stage 2", [5.0, 4.0001]),
        made_up_run(compare_modules, "zeroopt stage 2, 8-bit moments", [5.0, 4.0021]),
        made_up_run(compare_modules, "zeroopt stage 0", [5.0, float("nan")]),
        made_up_run(compare_modules, ddp, [5.0, 4.0]),
    ]
    (comparison,) = compare_modules["summary"].summarize(runs)
    assert [row.wrong for row in comparison.rows] == [
        "loss 4.0021 instead of 4.0000 in step 2",
        None,
        None,
        "loss nan instead of 4.0000 in step 2",
        None,
    ]


def test_compare_sums_up_rounds(compare_modules: dict[str, Any]) -> None:
    runs = [made_up_run(compare_modules, "no communication", [5.0], step_s) for step_s in (0.1, 0.3)]
    (comparison,) = compare_modules["summary"].summarize(runs)
    (row,) = comparison.rows
    assert row.step_s.median == pytest.approx(0.5)  # of 0.2, 0.4, 0.6 and 1.2
    assert row.cpu_s == 1.0  # of two ranks, in one of two steps
    assert row.sent_bytes == 50
    assert row.pss_bytes == 500
    parameters = row.setting.parameters
    assert comparison.limit.forward_backward_s == pytest.approx(0.3)
    assert comparison.limit.optimizer_s == pytest.approx(28 * parameters / 28e6 / 2)
    assert comparison.limit.collectives_s == pytest.approx(4 * parameters / 4e6)


def test_compare_counts_what_a_connection_sends(compare_modules: dict[str, Any]) -> None:
    sent_bytes = compare_modules["network"].sent_bytes
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0] as peer,
    ):
        open_before = set(os.listdir("/proc/self/fd"))
        before = sent_bytes()
        assert set(os.listdir("/proc/self/fd")) == open_before, "nothing is left open"
        client.sendall(bytes(1000))
        assert sent_bytes() - before == 1000
        peer.sendall(bytes(10))
        assert sent_bytes() - before == 1010


@pytest.mark.parametrize(("model", "parameters"), [("gpt-34m", 33.6e6), ("1M", 1e6), ("20M", 20e6), ("1.3B", 1.3e9)])
def test_compare_fits_shapes(compare_modules: dict[str, Any], model: str, parameters: float) -> None:
    setting = compare_modules["setting"]
    vocabulary = 512 if model == "1M" else 8192
    layers, width = setting.shape_of(model, vocabulary)
    whole = setting.Setting(layers, width, vocabulary, 128, 1, "float32", None, 2, 1, "cpu")
    assert whole.parameters == pytest.approx(parameters, rel=0.15)


@pytest.mark.parametrize("fixed", [0.0, 7.0, -1.5])
@pytest.mark.parametrize("power", [1.0, 2.0, 0.5, 0.0])
def test_largest_by_lines(compare_modules: dict[str, Any], fixed: float, power: float) -> None:
    for largest in range(13):
        tried: list[int] = []

        def held(layers: int, largest: int = largest, tried: list[int] = tried) -> float:
            tried.append(layers)
            return float(fixed + layers**power + (layers > largest) * 1e3)

        budget = fixed + max(largest, 1) ** power if largest else -100.0
        assert compare_modules["budget"].largest_within(budget, held, 3) == min(largest, 12)
        assert len(set(tried)) == len(tried), "each is tried once"


def test_few_are_tried_where_each_takes_as_much(compare_modules: dict[str, Any]) -> None:
    tried: list[int] = []

    def held(layers: int) -> float:
        tried.append(layers)
        return 20.0 + 3.0 * layers

    assert compare_modules["budget"].largest_within(200.0, held, 100) == 60
    assert len(tried) <= 4


def test_largest_in_a_budget(run_bench: RunBench, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    shape = ("--width=64", "--vocabulary=64", "--tokens=8")
    methods = ("--methods", "DDP, bucket views", "remainders")
    outcome = run_bench("compare.__main__", "--budget-mb=0.001", *shape, *methods, f"--out={path}")
    assert outcome.returncode == 0, outcome.stderr
    (search,) = json.loads(path.read_text())["searches"]
    ddp, refused = search["found"]
    assert (ddp["layers"], ddp["parameters"], list(ddp["tried"])) == (0, 0, ["1"])
    assert refused["problem"] == "needs --precision bfloat16"
    report = (tmp_path / "report.md").read_text()
    assert "## The largest model in 0.001 MB a rank: 2 ranks" in report
    assert {entry.name for entry in tmp_path.iterdir()} == {"results.json", "report.md", "largest-0.png"}
    outcome = run_bench("report", str(path))
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "report.md").read_text() == report


def test_compare_sweeps(run_bench: RunBench, tmp_path: Path) -> None:
    options = ("--world-sizes", "2", "1", "--steps=1", "--methods", "zeroopt stage 2", "DDP, bucket views, fused AdamW")
    outcome = compare_to(run_bench, tmp_path / "results.json", *options)
    assert outcome.returncode == 0, outcome.stderr
    lines = (tmp_path / "report.md").read_text().splitlines()
    begin = lines.index("## By ranks")
    assert lines[begin + 4] == "| method | 1 | 2 |"
    assert [line.split(" | ")[0] for line in lines[begin + 6 : begin + 8]] == [
        "| DDP, bucket views, fused AdamW",
        "| zeroopt stage 2",
    ]
    assert " ms" not in lines[begin + 6]
    assert lines[begin + 6].count("(1.00)") == 2
    assert (tmp_path / "by-ranks.png").exists()


def test_compare_fails_with_a_method(run_bench: RunBench, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    options = ("--steps=1", "--timeout=0.01", "--methods", "zeroopt stage 2")
    assert compare_to(run_bench, path, *options).returncode == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert row["problem"] == "stopped after 0 s"


def test_a_sweep_ends_where_memory_does(compare_modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, setting = compare_modules["sweep"], compare_modules["setting"]
    small, large = (setting.Setting(layers, 64, 64, 8, 1, "float32", None, 2, 1, "cpu") for layers in (1, 10))
    needed = 2 * 16 * large.parameters
    monkeypatch.setattr(sweep, "available_bytes", lambda: needed / sweep.MEMORY_PART)
    assert sweep.that_fit([small, large]) == [small, large]
    monkeypatch.setattr(sweep, "available_bytes", lambda: needed / sweep.MEMORY_PART - 1)
    assert sweep.that_fit([small, large]) == [small]


def test_methods_are_chosen_by_name_or_part(compare_modules: dict[str, Any]) -> None:
    chosen = compare_modules["methods"].chosen_methods
    assert chosen(["zeroopt stage 2"]) == ["zeroopt stage 2"]
    assert chosen(["moments", "fsdp1"]) == [
        "zeroopt stage 2, bfloat16 moments",
        "zeroopt stage 2, 8-bit moments",
        "FSDP1, SHARD_GRAD_OP",
    ]
    assert chosen([""]) == list(compare_modules["methods"].METHODS)
    assert chosen(["no such thing"]) == []
