"""What a wheel may hold: the package with one compiled module, without names of functions, debug symbols or libraries beside it."""

from __future__ import annotations

import re
import subprocess
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

# What every Linux of the wheel's tag has. An OpenMP runtime is not among them: see csrc/cpu/openmp.h.
SYSTEM_LIBRARIES = {
    "libstdc++.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libc.so.6",
    "libdl.so.2",
    "librt.so.1",
    "libpthread.so.0",
}
LOADERS = re.compile(r"ld-linux[\w-]*\.so\.\d")


def problems_of(wheel: Path) -> list[str]:
    """What is in a wheel that should not be, or is not in it; nothing when all is well."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        problems = problems_of_names(names)
        for name in names:
            if ".so" in PurePosixPath(name).suffixes:
                problems += [
                    f"{name}: {problem}" for problem in _problems_of_module(Path(archive.extract(name, folder)))
                ]
    return problems


def problems_of_names(names: Sequence[str]) -> list[str]:
    """What the names of a wheel's files tell of what is wrong with it."""
    problems = []
    for name in names:
        folder, _, _ = name.partition("/")
        if folder != "zeroopt" and not re.fullmatch(r"zeroopt-[^/]+\.dist-info", folder):
            problems.append(f"{name} is neither of the package nor about it")
    modules = [name for name in names if ".so" in PurePosixPath(name).suffixes]
    if len(modules) != 1:
        problems.append(f"expected one compiled module, got {', '.join(modules) or 'none'}")
    missing = {"zeroopt/py.typed", "zeroopt/_C.pyi", "zeroopt/__init__.py"} - set(names)
    return problems + [f"{name} is missing" for name in sorted(missing)]


def _problems_of_module(module: Path) -> list[str]:
    told = subprocess.run(
        ["readelf", "--wide", "--sections", "--dynamic", module], capture_output=True, text=True, check=True
    )
    return problems_of_elf(told.stdout)


def problems_of_elf(text: str) -> list[str]:
    """What is wrong with a compiled module.

    Args:
        text: its sections and dynamic entries, as readelf prints them.
    """
    sections = re.findall(r"^ +\[ *\d+\] (\.[\w.]+)", text, re.MULTILINE)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", text)
    strange = [name for name in needed if name not in SYSTEM_LIBRARIES and not LOADERS.fullmatch(name)]
    problems = [f"has {name}" for name in sections if name == ".symtab" or name.startswith(".debug")]
    problems += [f"needs {name}, which not every Linux has" for name in strange]
    problems += [
        f"has a search path for libraries, {path}" for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", text)
    ]
    return problems
