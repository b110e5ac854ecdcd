"""All that a first run on a GPU should tell, in one command and some 8 minutes.

    python -m bench.gpu                    # builds the kernels, tests, compares, measures
    python -m bench.gpu --only build kernels
    python -m bench.gpu --rehearse         # on the CPU, with next to nothing to do: does all of it work?

Needs a CUDA build of torch and pytest, and to build the kernels nvcc, a C++ compiler and CMake; no network. Reports are written
after each part, into the folder that the environment variable OUT names, else `runs/gpu`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.gpu.command import ROOT
from bench.gpu.part import Findings, Part, Setting
from bench.gpu.parts import PARTS
from bench.gpu.report import DONE, NOT_RUN, RUNNING, Entry, Report, section

LEAST_S = 10.0  # with less time left a part is not begun


def main() -> int:
    """1 where something is wrong that was looked at."""
    arguments = parse_arguments()
    with TemporaryDirectory(prefix="zeroopt-gpu-") as scratch:
        device = "cpu" if arguments.rehearse else "cuda"
        setting = Setting(device, torch.cuda.device_count(), Path(scratch))
        report = Report(arguments.out, setting, [part for part in PARTS if part.name in arguments.only])
        run_parts(report, setting, time.monotonic() + 60 * arguments.minutes)
    print(f"{report.folder / 'report.md'}")
    return 0 if report.is_well else 1


def run_parts(report: Report, setting: Setting, deadline: float) -> None:
    """One after the other, for as long as there is time. Whatever goes wrong in one is in the report."""
    for entry in report.entries:
        left_s = deadline - time.monotonic()
        if setting.num_devices < entry.part.min_devices and not (setting.rehearses and entry.part.min_devices == 1):
            entry.status = f"{NOT_RUN}: needs {entry.part.min_devices} GPUs"
        elif left_s < LEAST_S:
            entry.status = f"{NOT_RUN}: no time was left"
        else:
            entry.status = RUNNING
            report.write()
            run_part(entry, setting, left_s)
            print("\n".join(section(entry)), flush=True)
        report.write()


def run_part(entry: Entry, setting: Setting, left_s: float) -> None:
    begin = time.monotonic()
    try:
        entry.findings = entry.part.run(setting, min(entry.part.limit_s, left_s))
    except Exception as error:  # noqa: BLE001  the other parts are to run
        entry.findings = Findings(f"{type(error).__name__}: {error}")
    entry.status, entry.seconds = DONE, time.monotonic() - begin


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in small")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="after which no part is begun, and the last one is stopped"
    )
    names = names_of(PARTS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
    parser.add_argument("--out", type=Path, default=out, help="folder of the reports")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device, or torch is a build without CUDA; --rehearse runs on the CPU")
    return arguments


def names_of(parts: Sequence[Part]) -> list[str]:
    return [part.name for part in parts]


if __name__ == "__main__":
    sys.exit(main())
