"""`bench.gpu`: its rehearsal runs, and whatever goes wrong in a part is in the report, which is there at every moment."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT
from torch.profiler import DeviceType

from bench.gpu import build, counting, step_table, tests
from bench.gpu.__main__ import run_parts
from bench.gpu.command import run_command
from bench.gpu.part import Findings, Part, Setting, Table
from bench.gpu.parts import PARTS
from bench.gpu.record import VARIABLE, outcomes_in
from bench.gpu.report import Report
from zeroopt._C import build_info

OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}

THREE_TESTS = """
import os, signal
def test_good(): pass
def test_bad(): assert 1 == 2
def test_at_the_limit(): os.kill(os.getpid(), signal.SIGKILL)
"""

# Both processes hold the lock, and the output is closed when the first one has ended.
PARENT_AND_CHILD = """
import fcntl, subprocess, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
child = [sys.executable, "-c", "import time; time.sleep(600)"]
subprocess.run(child, pass_fds=[file.fileno()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
"""


@pytest.fixture
def on_gpu(tmp_path: Path) -> Setting:
    return Setting("cuda", 1, tmp_path)


@pytest.fixture
def rehearsal(tmp_path: Path) -> Setting:
    return Setting("cpu", 0, tmp_path)


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--only", "build", "training step", "kernels"]
    ended = subprocess.run(
        command, cwd=ROOT, env=OUTSIDE | {"OUT": str(tmp_path / "new")}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["rehearsal"] is True
    built, step, kernels = report["parts"]
    assert all((part["status"], part["problem"]) == ("done", None) for part in (built, step, kernels))
    losses = [result["losses"][-1] for result in step["figures"]["results"].values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-2)
    assert {row["name"] for row in kernels["figures"]["rows"]} >= {"AdamW, one tensor", "pack float32"}
    markdown = (tmp_path / "new" / "report.md").read_text()
    assert "no figure says anything about a GPU" in markdown
    assert "| DDP, fused AdamW |" in markdown
    assert {entry.name for entry in (tmp_path / "new").iterdir()} == {"report.json", "report.md", "output.txt"}


def test_each_part_has_a_name_of_its_own() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)


def test_what_goes_wrong_is_in_the_report(tmp_path: Path, on_gpu: Setting) -> None:
    def fail(setting: Setting, limit_s: float) -> Findings:
        raise ValueError("expected this")

    def find(setting: Setting, limit_s: float) -> Findings:
        assert json.loads((tmp_path / "report.json").read_text())["parts"][1]["status"] == "running"
        assert limit_s <= 7
        return Findings(notes=["A note."], tables=[Table("Numbers", ("a", "b"), [("1", "2|3")])], figures={"a": 1})

    def wrong(setting: Setting, limit_s: float) -> Findings:
        return Findings("too slow", output="the last words\n")

    parts = [
        *(
            Part("failing", "Does it fail?", 5, fail),
            Part("finding", "What?", 7, find),
            Part("wrong", "Is it?", 5, wrong),
        ),
        Part("several", "Are there?", 5, find, min_devices=2),
    ]
    report = Report(tmp_path, on_gpu, parts)
    run_parts(report, on_gpu, time.monotonic() + 60)
    assert not report.is_well
    written = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert [part["problem"] for part in written] == ["ValueError: expected this", None, "too slow", None]
    assert [part["status"] for part in written] == ["done", "done", "done", "not run: needs 2 GPUs"]
    assert written[1]["figures"] == {"a": 1}
    markdown = (tmp_path / "report.md").read_text()
    assert "| 1 | 2\\|3 |" in markdown
    assert "the last words" in markdown


def test_without_time_no_part_is_begun(tmp_path: Path, on_gpu: Setting) -> None:
    def never(setting: Setting, limit_s: float) -> Findings:
        raise AssertionError

    report = Report(tmp_path, on_gpu, [Part("late", "Is it?", 60, never)])
    run_parts(report, on_gpu, time.monotonic() + 1)
    (part,) = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert (part["status"], part["problem"]) == ("not run: no time was left", None)


def test_a_command_is_stopped_with_all_that_it_has_started(tmp_path: Path) -> None:
    ended = run_command([sys.executable, "-c", PARENT_AND_CHILD, str(tmp_path / "lock")], limit_s=3.0)
    assert ended.status is None
    assert (ended.problem or "").startswith("stopped after")
    with open(tmp_path / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the test's own timeout where one of them lives on


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("print(1)", None),
        ("raise SystemExit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    ],
)
def test_how_a_command_ends(code: str, problem: str | None) -> None:
    assert run_command([sys.executable, "-c", code], limit_s=300).problem == problem


def test_what_became_of_tests_is_known_when_they_are_stopped(tmp_path: Path) -> None:
    file, record = tmp_path / "test_three.py", tmp_path / "record"
    file.write_text(THREE_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.record", "--rootdir", str(tmp_path), str(file)]
    ended = run_command(command, 300.0, {VARIABLE: str(record)})
    assert ended.problem == "killed by SIGKILL"  # as whatever `run_command` stops
    good, bad = outcomes_in(record)
    assert (good.outcome, bad.outcome) == ("passed", "failed")
    assert bad.test.endswith("test_bad")
    assert "AssertionError" in bad.message


def test_kernels_that_are_not_tested_on_a_gpu_are_a_problem(on_gpu: Setting, rehearsal: Setting) -> None:
    """As where the build has none: all their tests would be skipped."""
    counts = tests.Counter({"skipped": 5})
    assert tests.problem_of(counts, on_gpu) == "no test has passed"
    assert tests.problem_of(counts, rehearsal) is None
    assert tests.problem_of(tests.Counter({"passed": 2, "failed": 1}), on_gpu) == "1 of 3 tests failed"


def test_files_with_tests_for_a_gpu_are_found() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in tests.marked_files()}
    assert files >= {"tests/csrc/cuda/test_on_gpu.py", "tests/training/test_on_gpu.py"}


def event(name: str, start: float, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=start + 10))


def test_calls_within_the_counted_steps_count() -> None:
    events = [
        event(counting.WINDOW, 500, DeviceType.CUDA),
        *(event("cudaLaunchKernel", 3), event("cudaStreamSynchronize", 4)),  # before
        event(counting.WINDOW, 5),
        *(event("cudaLaunchKernel", 5), event("cuLaunchKernelEx", 6), event("cudaLaunchKernelExC", 14)),
        *(event("cudaMemcpyAsync", 7), event("cudaStreamSynchronize", 8), event("cudaEventRecord", 9)),
        event("a kernel", 10, DeviceType.CUDA),
        event("cudaDeviceSynchronize", 15),  # behind
    ]
    calls = counting.calls_among(events, 2, {"zeroopt/a.py:7": 1})
    assert calls == counting.Calls(launches=1.5, waits=0.5, copies=0.5, wait_places={"zeroopt/a.py:7": 1})


def test_places_of_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    ((place, times),) = counting.wait_places(step).items()
    assert (place.rpartition(":")[0].endswith("bench/test_gpu.py"), times) == (True, 2)
    assert modes == ["warn", "default"]


def test_steps_as_tables() -> None:
    figures = {
        "step_s": [0.02, 0.04, 0.03],
        "optimizer_s": [0.001],
        "host_s": [0.005],
        "calls": {"launches": 62.5, "waits": 0, "copies": 3, "wait_places": {"zeroopt/a.py:7": 2}},
        "held_bytes": 16000,
        "peak_bytes": 5_000_000,
        "formula_bytes": 16000,
        "planned_bytes": None,
        "losses": [5.0, 4.0],
    }
    report = {"parameters": 1000, "ranks": 1}
    times, waits = step_table.time_tables({"DDP": figures, "stage 2": {**figures, "step_s": [0.06]}}, figures)
    assert times.rows[1] == ("stage 2", "60.00", "2.00", "1.00", "5.00", "62.5", "0", "3", "4.0000")
    assert waits.rows[0] == ("DDP", "zeroopt/a.py:7", "2")
    (memory,) = step_table.memory_tables({"DDP": figures}, report)
    assert memory.rows == [("DDP", "16.00", "16.00", "5", "")]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="there is no cmake or no ninja")
def test_the_headers_that_torch_carries_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To compile what needs pybind11. Without optimising: that takes longer, and reads no other headers."""
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    configured = run_command(["cmake", *build.options([])], limit_s=300)
    assert configured.status == 0, configured.output
    bindings = "CMakeFiles/_C.dir/csrc/bindings.cpp.o"
    listed = run_command(["ninja", "-C", str(tmp_path), "-t", "commands", bindings], limit_s=300)
    assert listed.status == 0, listed.output
    command = listed.output.splitlines()[-1]
    assert " -O3 " in command and command.endswith("bindings.cpp")
    compiled = run_command(["sh", "-c", f"cd {shlex.quote(str(tmp_path))} && {command} -O0"], limit_s=600)
    assert compiled.status == 0, compiled.output
    assert (tmp_path / bindings).exists()


def test_the_module_is_put_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, place = tmp_path / "built", tmp_path / build.MODULE_NAME
    built.write_text("new")
    place.write_text("old")
    monkeypatch.setattr(build, "module", lambda: place)
    with place.open() as loaded:
        build.install(built)
        assert loaded.read() == "old"
    assert place.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["built", build.MODULE_NAME])


@pytest.mark.parametrize(("archs", "built"), [([], True), (["90-real"], None), (["33-real"], False)])
def test_it_is_known_what_was_built(archs: list[str], built: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "newest_source_s", lambda: 0.0)
    expected = any(arch.startswith("90") for arch in build_info()["cuda_archs"]) if built is None else built
    assert build.is_built_for(archs) == expected
    monkeypatch.setattr(build, "newest_source_s", lambda: time.time() + 60)
    assert not build.is_built_for(archs)
