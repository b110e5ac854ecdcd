"""Build wheels, look into them, and try each: `make wheels`, or

python -m wheels --pythons 3.11 3.13 --flavours cpu --torch 3.11=torch==2.13.0
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

from wheels.building import Flavour, build_kernels, build_sources, build_wheel, cpu_flavour, cuda_flavour, run
from wheels.contents import problems_of
from wheels.interpreters import ROOT, Interpreter, find_interpreter, supported_versions
from wheels.sysroot import make_sysroot, toolchain
from wheels.trying import try_wheel


def main() -> None:
    arguments = _parser().parse_args()
    torches = dict(entry.partition("=")[::2] for entry in arguments.torch)
    interpreters, absent = _interpreters(arguments.pythons)
    flavours = [_flavour(name) for name in arguments.flavours]
    work = ROOT / "build" / "wheels"
    shutil.rmtree(work, ignore_errors=True)
    for folder in (work, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)

    compilers = {} if arguments.sysroot is None else _compilers_of(arguments.sysroot.resolve())
    sources = build_sources(arguments.out, work)
    rows = []
    for flavour in flavours:
        kernels = build_kernels(sources, flavour, compilers, work)
        for interpreter in interpreters:
            wheel = build_wheel(interpreter, sources, flavour, compilers, kernels, arguments.out, work)
            if problems := problems_of(wheel):
                raise SystemExit(f"{wheel}: " + "; ".join(problems))
            tried = try_wheel(wheel, interpreter, work, torches.get(interpreter.version))
            rows.append(f"{wheel.stat().st_size / 1e6:6.2f} MB  {wheel.name}  (tried: {tried})")
    run(["twine", "check", "--strict", *sorted(arguments.out.glob("zeroopt-*"))])
    print("", *rows, sep="\n")
    for version in absent:
        print(f"   none     for Python {version}: there is no python{version}, neither on PATH nor of pyenv's")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wheels", description="Build wheels, look into them, and try each.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="FOLDER", help="default: dist")
    parser.add_argument(
        "--pythons",
        nargs="+",
        default=None,
        metavar="VERSION",
        help="versions or paths; default: the supported ones at hand",
    )
    parser.add_argument("--flavours", nargs="+", choices=("cpu", "cuda"), default=_flavours_at_hand())
    parser.add_argument(
        "--torch",
        nargs="+",
        default=[],
        metavar="VERSION=REQUIREMENT",
        help="try that Python's wheels with this torch, too",
    )
    parser.add_argument(
        "--sysroot",
        type=Path,
        metavar="FOLDER",
        help="compile with this folder's compiler and libc, for older Linuxes; made of Debian 11's when it is not there",
    )
    return parser


def _compilers_of(sysroot: Path) -> dict[str, str]:
    if not sysroot.exists():
        make_sysroot(sysroot)
    return toolchain(sysroot)


def _interpreters(asked: list[str] | None) -> tuple[list[Interpreter], list[str]]:
    """Those that were found, and of the usual ones the versions that were not."""
    found = {version: find_interpreter(version) for version in asked or supported_versions()}
    absent = [version for version, interpreter in found.items() if interpreter is None]
    if asked and absent:
        raise SystemExit(f"there is no Python {', '.join(absent)}: put it on PATH, or give its path")
    return [interpreter for interpreter in found.values() if interpreter is not None], absent


def _flavours_at_hand() -> list[str]:
    return ["cpu", "cuda"] if shutil.which("nvcc") else ["cpu"]


def _flavour(name: str) -> Flavour:
    if name == "cpu":
        return cpu_flavour()
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", told)
    if release is None:
        raise SystemExit(f"nvcc does not say of which release it is: {told}")
    return cuda_flavour(release[1])


if __name__ == "__main__":
    main()
