"""Wheels with something in them that is not to travel are found, by the names of their files and by their module's headers."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from wheels.contents import problems_of, problems_of_elf, problems_of_names
from zeroopt import _C

MODULE = "zeroopt/_C.cpython-311-x86_64-linux-gnu.so"
NAMES = [
    "zeroopt/__init__.py",
    "zeroopt/_C.pyi",
    "zeroopt/py.typed",
    "zeroopt/ops/move.py",
    MODULE,
    "zeroopt-0.1.0+cu130.dist-info/METADATA",
    "zeroopt-0.1.0+cu130.dist-info/RECORD",
]
ELF = """
Section Headers:
  [Nr] Name              Type            Address          Off    Size   ES Flg Lk Inf Al
  [ 0]                   NULL            0000000000000000 000000 000000 00      0   0  0
  [ 1] .dynsym           DYNSYM          0000000000000270 000270 000300 18   A  5   1  8
  [12] .text             PROGBITS        0000000000001040 001040 000145 00  AX  0   0 16
Dynamic section at offset 0x2df8 contains 25 entries:
 0x0000000000000001 (NEEDED)             Shared library: [libstdc++.so.6]
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
 0x0000000000000001 (NEEDED)             Shared library: [ld-linux-x86-64.so.2]
"""


def test_names_of_a_good_wheel() -> None:
    assert problems_of_names(NAMES) == []


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([*NAMES, "tests/support/paths.py"], "tests/support/paths.py is neither of the package nor about it"),
        (
            [*NAMES, "zeroopt.libs/libgomp-a34b3233.so.1"],
            "zeroopt.libs/libgomp-a34b3233.so.1 is neither of the package",
        ),
        ([*NAMES, "zeroopt/_C.cpython-312-x86_64-linux-gnu.so"], "expected one compiled module, got "),
        ([name for name in NAMES if name != MODULE], "expected one compiled module, got none"),
        ([name for name in NAMES if name != "zeroopt/py.typed"], "zeroopt/py.typed is missing"),
    ],
)
def test_names_that_should_not_be_there_or_are_missing(names: list[str], problem: str) -> None:
    assert problem in "; ".join(problems_of_names(names))


def test_headers_of_a_good_module() -> None:
    assert problems_of_elf(ELF) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("  [25] .symtab           SYMTAB          0 0 0 18 26 45 8", "has .symtab"),
        ("  [ 7] .debug_info       PROGBITS        0 0 0 00 0 0 1", "has .debug_info"),
        (" 0x01 (NEEDED)             Shared library: [libgomp.so.1]", "needs libgomp.so.1, which not every Linux has"),
        (" 0x1d (RUNPATH)            Library runpath: [/opt/gcc/lib]", "has a search path for libraries, /opt/gcc/lib"),
    ],
)
def test_headers_of_a_module_that_is_not_to_travel(line: str, problem: str) -> None:
    assert problems_of_elf(ELF + line + "\n") == [problem]


def write_wheel(folder: Path, module: Path) -> Path:
    wheel = folder / "zeroopt-0.1.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in NAMES:
            archive.writestr(name, "" if name != MODULE else module.read_bytes())
    return wheel


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
def test_what_development_builds_has_more_names_than_a_wheel_and_else_nothing(tmp_path: Path) -> None:
    module = Path(_C.__file__)
    assert problems_of(write_wheel(tmp_path, module)) == [f"{MODULE}: has .symtab"]
    stripped = tmp_path / "stripped.so"
    subprocess.run(["strip", "-o", stripped, module], check=True)
    assert problems_of(write_wheel(tmp_path, stripped)) == []
