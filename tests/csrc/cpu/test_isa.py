"""Every compiled instruction set gives the same bits, and none of its instructions is anywhere else in the module."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import kernel_digests
import pytest
from wide_registers import count_wide_registers

from zeroopt import _C

pytestmark = pytest.mark.slow

ISAS = _C.build_info()["isas"]


def run_script(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ZEROOPT_CPU_ISA": isa}
    command = [sys.executable, kernel_digests.__file__, _C.__file__]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@functools.cache
def digests_of(isa: str) -> dict[str, Any]:
    """What the script prints, or a skip where this processor lacks the instruction set."""
    result = run_script(isa)
    if "does not support it" in result.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_agree_bit_for_bit(isa: str) -> None:
    result = digests_of(isa)
    assert result["isa"] == isa
    assert result["digests"] == digests_of("generic")["digests"]


def test_module_needs_no_torch() -> None:
    assert digests_of("generic")["torch"] is False


def test_generic_and_the_one_in_use_are_compiled() -> None:
    assert ISAS[0] == "generic"
    assert _C.cpu_isa() in ISAS


@pytest.mark.parametrize("isa", ["sse9", "AVX2"])
def test_unknown_instruction_set_fails_the_import(isa: str) -> None:
    result = run_script(isa)
    assert result.returncode != 0
    assert re.search(f"ImportError: ZEROOPT_CPU_ISA={isa} is not in this build, which has generic", result.stderr)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
@pytest.mark.skipif(len(ISAS) == 1, reason="this build has generic kernels only")
def test_wide_instructions_stay_in_their_namespaces() -> None:
    command = ["objdump", "-dC", "--no-show-raw-insn", _C.__file__]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = count_wide_registers(dump)
    assert all(used[isa] > 100 for isa in ISAS[1:]), used


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_no_symbol_that_the_linker_could_merge_comes_from_wide_code() -> None:
    symbols = subprocess.run(["nm", "-C", _C.__file__], capture_output=True, text=True, check=True).stdout
    weak = [line for line in symbols.splitlines() if re.match(r"\S+ [WV] ", line)]
    assert not [line for line in weak if re.search(r"::(avx2|avx512|sve)::", line)]
