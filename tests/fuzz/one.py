"""`python -m tests.fuzz.one TARGET [libFuzzer's arguments]`: one target under atheris, until its time is over or it has failed."""

from __future__ import annotations

import pickletools
import sys

import atheris
from torch._weights_only_unpickler import Unpickler

# Whose branches the fuzzer sees, beside those of two functions of others that readers go through. Compiled code it does not see.
INSTRUMENTED = ["zeroopt", "tests.csrc"]

with atheris.instrument_imports(include=INSTRUMENTED):
    from tests.fuzz.targets import TARGETS

for function in (pickletools._genops, Unpickler.load):
    atheris.instrument_func(function)

atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]].run)
atheris.Fuzz()
