"""What an older Linux's compiler is told, and that `pow` goes by its older name."""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from wheels.sysroot import OLD_NAMES, make_sysroot, toolchain

# Reads numbers that no compiler knows, so that it has to call the function.
PROGRAM = """
#include <cmath>
#include <cstdio>
#include <cstdlib>
int main(int, char** numbers) { std::printf("%a", std::pow(std::atof(numbers[1]), std::atof(numbers[2]))); }
"""


def test_compiler_and_libc_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "an older one"
    compiler = folder / "usr" / "bin" / "g++-10"
    compiler.parent.mkdir(parents=True)
    compiler.touch()
    variables = toolchain(folder)
    assert shlex.split(variables["CXX"]) == [str(compiler)] == [variables["CUDAHOSTCXX"]]
    assert shlex.split(variables["CXXFLAGS"]) == [f"--sysroot={folder}", "-include", str(OLD_NAMES)]
    assert shlex.split(variables["LDFLAGS"]) == [f"--sysroot={folder}"]
    assert shlex.split(variables["CUDAFLAGS"]) == [f"-Xcompiler=--sysroot={folder},-include,{OLD_NAMES}"]


def test_folder_without_a_compiler(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"g\+\+-NUMBER, as Debian has one: remove the folder"):
        toolchain(tmp_path)


def test_without_a_keyring_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wheels.sysroot.KEYRING", tmp_path / "keyring.gpg")
    with pytest.raises(FileNotFoundError, match="install debian-archive-keyring"):
        make_sysroot(tmp_path / "sysroot")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="there is no g++, or no nm")
def test_pow_goes_by_its_older_name_and_is_the_same(tmp_path: Path) -> None:
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    subprocess.run(["g++", "-include", OLD_NAMES, source, "-o", program], check=True)
    symbols = subprocess.run(["nm", "-D", program], capture_output=True, text=True, check=True).stdout
    (name,) = [line.split()[-1] for line in symbols.splitlines() if " pow@" in line]
    assert name in ("pow@GLIBC_2.2.5", "pow@GLIBC_2.17")
    told = subprocess.run([program, "0.999", "12345"], capture_output=True, text=True, check=True).stdout
    assert float.fromhex(told) == math.pow(0.999, 12345)
