"""The machine code of the CUDA kernels in a build, read with NVIDIA's disassembler (`cuobjdump` and `nvdisasm`). No GPU is needed.

The tools are taken from PATH, CUDA_HOME or CUDA_PATH, else from PyPI.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

TOOLS = ("cuobjdump", "nvdisasm")
PACKAGES = ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")
VECTOR_LOAD = re.compile(r"\bLDG\.E[.\w]*\.128\b")
VECTOR_STORE = re.compile(r"\bSTG\.E[.\w]*\.128\b")
FLOAT64 = re.compile(r"\b(DADD|DMUL|DFMA|DSETP|F2F\.F64\.F32|F2F\.F32\.F64)\b")

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_TARGET = re.compile(r"\b(0x[0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Kernel:
    """One compiled instance of a kernel.

    Attributes:
        name: mangled.
        text: its disassembly.
        registers: of a thread, from the compiler.
    """

    name: str
    text: str
    registers: int

    def is_of(self, function: str, *template_arguments: str) -> bool:
        """Whether it is an instance of zeroopt's kernel of that name; in a mangled name, a name's length comes before it."""
        return f"cuda{len(function)}{function}" in self.name and all(part in self.name for part in template_arguments)

    @cached_property
    def instructions(self) -> list[tuple[int, str]]:
        """Addresses and what is there."""
        return [(int(address, 16), code) for address, code in _INSTRUCTION.findall(self.text)]

    def fewest_instructions(self, loads: int, stores: int) -> list[str] | None:
        """The shortest way around a loop with exactly so many 16-byte loads and stores; None where there is none.

        That is what a warp executes for a tile in the middle of a segment, but for what data makes it branch to rarely.
        """
        starts = [i for i, (_, code) in enumerate(self.instructions) if VECTOR_LOAD.search(code)]
        ways = [way for start in starts if (way := self._way_around(start, loads, stores)) is not None]
        return min(ways, key=len, default=None)

    def _way_around(self, start: int, loads: int, stores: int) -> list[str] | None:
        """Dijkstra over places and numbers of vector accesses so far; every instruction counts alike."""
        begin, end = (start, 0, 0), (start, loads, stores)
        before: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        waiting = [(0, begin)]
        while waiting:
            length, here = heapq.heappop(waiting)
            if here == end and length:
                return self._codes_on_the_way(before, begin, end)
            place, loaded, stored = here
            code = self.instructions[place][1]
            loaded += bool(VECTOR_LOAD.search(code))
            stored += bool(VECTOR_STORE.search(code))
            if loaded > loads or stored > stores:
                continue
            for successor in self._successors[place]:
                there = (successor, loaded, stored)
                if there not in before:
                    before[there] = here
                    heapq.heappush(waiting, (length + 1, there))
        return None

    def _codes_on_the_way(
        self,
        before: dict[tuple[int, int, int], tuple[int, int, int]],
        begin: tuple[int, int, int],
        end: tuple[int, int, int],
    ) -> list[str]:
        way = [before[end]]
        while way[-1] != begin:
            way.append(before[way[-1]])
        return [self.instructions[place][1] for place, _, _ in reversed(way)]

    @cached_property
    def _successors(self) -> list[list[int]]:
        """The instructions that may follow each one. Functions that are called are for rare operands, and not followed."""
        places = {address: place for place, (address, _) in enumerate(self.instructions)}
        result = []
        for place, (_, code) in enumerate(self.instructions):
            is_conditional = code.startswith("@") or re.search(r"\bBRA\b[.\w]* !?U?P\d", code) is not None
            following = [place + 1] if place + 1 < len(self.instructions) else []
            target = _TARGET.search(code)
            if re.search(r"\bBRA\b", code) and target is not None:
                there = places.get(int(target[1], 16))
                branch = [] if there is None or "BRA.DIV" in code else [there]
                result.append(branch + (following if is_conditional or "BRA.DIV" in code else []))
            elif re.search(r"\b(EXIT|CALL|RET|BRX)\b", code) and not is_conditional:
                result.append([])
            else:
                result.append(following)
        return result


def find_tools() -> Path | None:
    """The folder of installed tools."""
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    on_path = shutil.which(TOOLS[0])
    folders += [Path(on_path).parent] if on_path else []
    return next((folder for folder in folders if all((folder / tool).exists() for tool in TOOLS)), None)


def download_tools(folder: Path) -> Path:
    """Unpack the tools into a folder without installing them.

    Raises:
        RuntimeError: there is no package index to be reached.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), *PACKAGES]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"no cuobjdump on PATH or in CUDA_HOME, and none to download: {result.stderr[-500:]}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    tools = next(folder.rglob(TOOLS[0])).parent
    for tool in TOOLS:
        (tools / tool).chmod(0o755)
    return tools


def read_kernels(library: Path, arch: str, tools: Path) -> list[Kernel]:
    """All kernels that a library has for an architecture, such as "90"."""
    code = _split(_dump(library, arch, tools, "--dump-sass"), r"^\s*Function : (\w+)$")
    usage = _split(_dump(library, arch, tools, "--dump-resource-usage"), r"^\s*Function (\w+):$")
    registers = {name: int(re.search(r"\bREG:(\d+)", text)[1]) for name, text in usage.items()}  # type: ignore[index]
    return [Kernel(name, text, registers[name]) for name, text in code.items()]


def _dump(library: Path, arch: str, tools: Path, what: str) -> str:
    command = [str(tools / TOOLS[0]), what, "--gpu-architecture", f"sm_{arch}", str(library)]
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def _split(text: str, heading: str) -> dict[str, str]:
    parts = re.split(heading, text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
