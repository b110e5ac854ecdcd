"""The libc and the compiler of an older Linux in a folder. What they make runs on Linuxes as old as that, too.

They are Debian's packages, unpacked and not installed: no container and no root is needed, only apt and dpkg.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from wheels.interpreters import ROOT

MIRROR = "http://deb.debian.org/debian"
SUITE = "bullseye"  # Debian 11: glibc 2.31, GCC 10
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
OLD_NAMES = ROOT / "wheels" / "old_glibc.h"


def toolchain(folder: Path) -> dict[str, str]:
    """The variables by which CMake and nvcc compile and link with what is in a folder.

    Raises:
        ValueError: there is no compiler in it.
    """
    compilers = sorted((folder / "usr" / "bin").glob("g++-[0-9]*"))
    if not compilers:
        raise ValueError(
            f"expected a compiler {folder}/usr/bin/g++-NUMBER, as Debian has one: remove the folder to have it made anew"
        )
    options = [f"--sysroot={folder}", "-include", str(OLD_NAMES)]
    return {
        "CXX": shlex.quote(str(compilers[-1])),
        "CXXFLAGS": shlex.join(options),
        "LDFLAGS": shlex.quote(options[0]),
        "CUDAHOSTCXX": str(compilers[-1]),
        "CUDAFLAGS": shlex.quote(f"-Xcompiler={','.join(options)}"),
    }


def make_sysroot(folder: Path) -> None:
    """Fetch a compiler and what it needs, and unpack that into a folder, which is there only once it is whole.

    Raises:
        FileNotFoundError: there is no apt, no dpkg, or no keyring by which packages are checked.
        subprocess.CalledProcessError: apt or dpkg failed.
    """
    if not KEYRING.exists():
        raise FileNotFoundError(f"there is no {KEYRING}: install debian-archive-keyring")
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in ("lib", "lib64", "bin", "sbin"):  # of which packages name either
        (unfinished / "usr" / name).mkdir(parents=True)
        (unfinished / name).symlink_to(f"usr/{name}")
    for package in _fetch_packages(unfinished / "apt"):
        subprocess.run(["dpkg", "--extract", package, unfinished], check=True)
    shutil.rmtree(unfinished / "apt")
    _make_links_relative(unfinished)
    unfinished.rename(folder)


def _fetch_packages(folder: Path) -> list[Path]:
    """A compiler's packages and all that they depend on, by an apt that knows nothing of this system's.

    Without the assembler and the linker: this system's are as good, and those would run with libraries that it has not got.
    """
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    sources = folder / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {MIRROR} {SUITE} main\n")
    settings = {
        "Dir::State": folder / "state",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "--quiet", *(f"--option={name}={value}" for name, value in settings.items())]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "install", "--yes", "--no-install-recommends", "--download-only", "g++"], check=True)
    packages = (folder / "cache" / "archives").glob("*.deb")
    return sorted(path for path in packages if not path.name.startswith("binutils"))


def _make_links_relative(folder: Path) -> None:
    """A link such as libdl.so to /lib/…/libdl.so.2 would lead to what this system has there."""
    for path in folder.rglob("*"):
        if path.is_symlink() and (target := os.readlink(path)).startswith("/"):
            path.unlink()
            path.symlink_to(os.path.relpath(f"{folder}{target}", path.parent))
