"""Each target takes the inputs that a fuzzer begins with, and some that are changed a little."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_takes_its_examples_and_damaged_ones(name: str) -> None:
    target, rng = TARGETS[name], random.Random(0)
    for example in target.examples()[:8]:
        target.run(example)
        damaged = bytearray(example)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        target.run(bytes(damaged))
    target.run(b"")
