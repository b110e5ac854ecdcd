"""`module:function` on a command line."""

from __future__ import annotations

import math

import pytest

from zeroopt import ConfigError
from zeroopt.named_function import find_function


def test_it_is_what_the_module_has_under_that_name() -> None:
    assert find_function("--model", "math:floor") is math.floor


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("floor", "expected --model to be module:function, got 'floor'"),
        ("no_such_module:floor", "--model no_such_module:floor: No module named"),
        ("math:no_such_function", "--model math:no_such_function: module 'math' has no attribute"),
    ],
)
def test_what_it_cannot_be_is_told(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        find_function("--model", name)
