"""Which functions of a module use registers that not every processor of its kind has."""

from __future__ import annotations

import re
from collections import Counter

# What objdump calls them, the instruction set that brings them, and all whose kernels may use them.
_WIDE = (
    (re.compile(r"%ymm"), "avx2", ("avx2", "avx512")),
    (re.compile(r"%zmm"), "avx512", ("avx512",)),
    (re.compile(r"\bz\d+\.[bhsdq]\b"), "sve", ("sve",)),
)
_KERNEL = re.compile(r"zeroopt::cpu::(\w+)::")


def count_wide_registers(dump: str) -> Counter[str]:
    """How many instructions use the registers that each instruction set brings.

    Args:
        dump: what `objdump -dC` prints.

    Raises:
        AssertionError: some are outside of the kernels of an instruction set that has them.
    """
    used: Counter[str] = Counter()
    isa, function = "", ""
    for line in dump.splitlines():
        if line.endswith(">:"):
            function = line
            found = _KERNEL.search(line)
            isa = found[1] if found else ""
            continue
        for register, brings, may in _WIDE:
            if register.search(line):
                assert isa in may, f"{function} uses wide registers: {line}"
                used[brings] += 1
    return used
