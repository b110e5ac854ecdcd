"""The kernels under compute-sanitizer: accesses outside of arrays, and races in shared memory."""

from __future__ import annotations

import os
import shutil
import sys

from bench.gpu.command import run_command
from bench.gpu.part import Findings, Setting, Table
from bench.gpu.record import VARIABLE, outcomes_in
from bench.gpu.tests import KERNELS

FOUND = 99  # the exit status of a tool that has found something
CUDA_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")

# Which tests each tool runs: with memcheck all kernels, on special values alone; with racecheck those that use shared memory.
TOOLS = {
    "memcheck": "special_values or squared_norms or pack or reduce or quantize or wire_code",
    "racecheck": "squared_norms or quantize or wire_code or (special_values and (adamw or lamb))",
}


def run(setting: Setting, limit_s: float) -> Findings:
    """Each tool has its part of the time; what it has not come to is not looked at."""
    if setting.rehearses:
        return Findings(notes=["Needs a GPU."])
    path = os.pathsep.join([os.environ.get("PATH", ""), *CUDA_FOLDERS])
    program = shutil.which("compute-sanitizer", path=path)
    if program is None:
        return Findings("there is no compute-sanitizer")
    found = Findings()
    rows = [run_tool(program, tool, setting, limit_s / len(TOOLS), found) for tool in TOOLS]
    found.tables.append(Table("Tools", ("tool", "tests that ended", "s", "result"), rows))
    return found


def run_tool(program: str, tool: str, setting: Setting, limit_s: float, found: Findings) -> tuple[str, ...]:
    record = setting.scratch / f"{tool}.jsonl"
    command = [
        *(program, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all"),
        *(sys.executable, "-m", "pytest", str(KERNELS / "test_on_gpu.py"), "-m", "cuda", "-k", TOOLS[tool]),
        *("-q", "-p", "bench.gpu.record", "-p", "no:cacheprovider"),
    ]
    # An allocation a tensor, so that what lies behind its end is nobody's.
    ended = run_command(command, limit_s, {VARIABLE: str(record), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    outcomes = outcomes_in(record)
    result = "nothing found" if ended.status == 0 else ended.problem or ""
    if ended.status is not None and ended.status != 0:
        found.problem = f"{tool}: {ended.problem}"
    found.figures[tool] = {"status": ended.status, "tests": [vars(outcome) for outcome in outcomes]}
    found.output += ended.output
    return tool, str(len(outcomes)), f"{ended.seconds:.0f}", result
