"""Sources, the kernels once for all Pythons, and wheels of them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wheels.interpreters import ROOT, Interpreter, make_environment


@dataclass(frozen=True)
class Flavour:
    """What is compiled into a wheel.

    Attributes:
        label: behind the version, as in 0.1.0+cu130; empty for the wheel that an index may have.
    """

    name: str
    label: str
    options: tuple[str, ...]


def cpu_flavour() -> Flavour:
    return Flavour("cpu", "", ("-DZEROOPT_CUDA=off",))


def cuda_flavour(release: str) -> Flavour:
    """With the kernels that nvcc of a release, such as "13.0", compiles, for the architectures that are asked for or usual."""
    return Flavour("cuda", f"cu{release.replace('.', '')}", ("-DZEROOPT_CUDA=on",))


# Tools that were installed beside this Python come before the system's.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def run(command: Sequence[str | Path], folder: Path = ROOT, environment: Mapping[str, str] | None = None) -> None:
    """Run a command, showing what it says. What PYTHONPATH adds to this process is not there, or pip would take it for installed.

    Args:
        environment: variables beside those of this process.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    print("+", *command, flush=True)
    variables = {**os.environ, "PATH": PATH, **(environment or {})}
    variables.pop("PYTHONPATH", None)
    subprocess.run([os.fspath(part) for part in command], cwd=folder, env=variables, check=True)


def build_sources(out: Path, work: Path) -> Path:
    """Write the source distribution to `out`; returns it unpacked, from which all else is built: what it lacks is found so."""
    run([sys.executable, "-m", "build", "--sdist", "--outdir", work / "sdist", ROOT])
    (archive,) = (work / "sdist").glob("zeroopt-*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(work / "sources", filter="data")
    shutil.copy(archive, out)
    (sources,) = (work / "sources").iterdir()
    return sources


def build_kernels(sources: Path, flavour: Flavour, toolchain: Mapping[str, str], work: Path) -> Path:
    """Compile what needs no Python, by the compilers that variables name; returns the folder."""
    folder = work / flavour.name / "kernels"
    run(
        ["cmake", "-S", sources, "-B", folder, "-G", "Ninja", "-DZEROOPT_MODULE=OFF", *flavour.options],
        environment=toolchain,
    )
    jobs = os.environ.get("MAX_JOBS")
    run(["cmake", "--build", folder, *(["--parallel", jobs] if jobs else [])])
    return folder


def build_wheel(
    interpreter: Interpreter,
    sources: Path,
    flavour: Flavour,
    toolchain: Mapping[str, str],
    kernels: Path,
    out: Path,
    work: Path,
) -> Path:
    """Compile the bindings for one Python, and write a wheel to `out` that says from which glibc on it runs; returns it."""
    folder = work / flavour.name / interpreter.version
    builder = make_environment(interpreter, folder / "builder")
    environment = {
        **toolchain,
        "CMAKE_ARGS": f"{os.environ.get('CMAKE_ARGS', '')} {shlex.quote(f'-DZEROOPT_KERNELS={kernels}')}",
        "ZEROOPT_LOCAL_VERSION": flavour.label,
    }
    run([builder, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder / "plain", sources], environment=environment)
    (plain,) = (folder / "plain").glob("zeroopt-*.whl")
    run(["auditwheel", "repair", "--wheel-dir", folder / "repaired", plain])
    (wheel,) = (folder / "repaired").glob("zeroopt-*.whl")
    return Path(shutil.move(wheel, out / wheel.name))
