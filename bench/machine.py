"""What a measurement ran on."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


def describe_machine() -> dict[str, object]:
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "zeroopt": zeroopt_build(),
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def zeroopt_build() -> list[str]:
    """The lines of `python -m zeroopt env`: version, compiler, instruction sets, CUDA."""
    answer = subprocess.run([sys.executable, "-m", "zeroopt", "env"], capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()
