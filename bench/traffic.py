"""The least that a kernel's memory traffic costs: a loop, compiled here and now, that reads and writes the same arrays and adds.

What it is handed are the very dtypes and sizes; each array is read, written, or both, as the kernel does.
"""

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_C_TYPES = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}


@dataclass(frozen=True, eq=False)
class Stream:
    """An array that a kernel goes through once.

    Attributes:
        mode: "r", "w" or "rw".
    """

    array: Tensor
    mode: str

    @property
    def nbytes(self) -> int:
        """Bytes that go to and from memory."""
        return self.array.nbytes * len(self.mode)


def same_traffic(streams: Sequence[Stream]) -> Callable[[], None]:
    """A function that goes through the arrays once, on `torch.get_num_threads()` threads. All have as many elements."""
    kinds = tuple((stream.array.element_size(), stream.mode) for stream in streams)
    loop = _compile(kinds)
    addresses = [ctypes.c_void_p(stream.array.data_ptr()) for stream in streams]
    numel = ctypes.c_long(streams[0].array.numel())
    return lambda: loop(*addresses, numel, ctypes.c_int(torch.get_num_threads()))


@functools.cache
def _compile(kinds: tuple[tuple[int, str], ...]) -> Callable[..., None]:
    types = [_C_TYPES[size] for size, _ in kinds]
    arguments = ", ".join(f"{kind} *restrict a{i}" for i, kind in enumerate(types))
    reads = " + ".join(f"a{i}[i]" for i, (_, mode) in enumerate(kinds) if "r" in mode)
    writes = " ".join(f"a{i}[i] = ({types[i]})sum;" for i, (_, mode) in enumerate(kinds) if "w" in mode)
    source = f"""
    #include <stdint.h>
    uint32_t total;
    void loop({arguments}, long numel, int threads) {{
      uint32_t seen = 0;
      #pragma omp parallel for num_threads(threads) schedule(static) reduction(+: seen)
      for (long i = 0; i < numel; ++i) {{
        const uint32_t sum = (uint32_t)({reads});
        {writes or "seen += sum;"}
      }}
      total = seen;
    }}
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "loop.c").write_text(source)
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, "-o", path / "loop.so", path / "loop.c"], check=True)
        loop: Callable[..., None] = ctypes.CDLL(str(path / "loop.so")).loop
    return loop
