"""The most that this rank has held: resident memory by the kernel's own mark, device memory by torch's."""

from __future__ import annotations

from pathlib import Path

import torch


class Peak:
    """Bytes above those at its making."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from what is resident now (proc(5))
        self.resident_before = status_bytes("VmRSS")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.device_before = torch.cuda.memory_allocated(device)

    def resident(self) -> int:
        return status_bytes("VmHWM") - self.resident_before

    def on_device(self) -> int | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) - self.device_before


def status_bytes(field: str) -> int:
    """A size in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
