"""What a measurement ran on."""

import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from zeroopt.diagnosis.env import environment

PEERS = ("deepspeed", "fairscale")


def describe_machine() -> dict[str, object]:
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes("MemTotal"),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zeroopt": environment(),
        "peers": {name: version(name) for name in PEERS if find_spec(name)},
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def available_bytes() -> int:
    """Of the host's memory, without pushing anything out of it."""
    return memory_bytes("MemAvailable")


def memory_bytes(field: str) -> int:
    """A size in /proc/meminfo."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
