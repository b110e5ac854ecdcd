"""Who may open too few descriptors hears how many it takes."""

from __future__ import annotations

import os
import resource
from unittest.mock import patch

import pytest
from transports import LogLines

from zeroopt.collectives.descriptors import warn_of_few_descriptors


def said(needed: int, limits: tuple[int, int]) -> list[str]:
    with LogLines() as lines, patch("resource.getrlimit", lambda _: limits):
        warn_of_few_descriptors(needed, "testing")
    return lines


@pytest.mark.parametrize("limit", [resource.RLIM_INFINITY, 1 << 20])
def test_nothing_is_said_where_there_are_enough(limit: int) -> None:
    assert said(10_000, (limit, limit)) == []


def test_what_it_takes_is_said() -> None:
    num_open = len(os.listdir("/proc/self/fd")) - 1
    (line,) = said(10_000, (1024, 1 << 20))
    assert line == (
        f"testing needs 10000 descriptors; this process has {num_open} open and may have 1024: start it with more "
        f"(ulimit -n {num_open + 10_000})"
    )
    assert said(1024 - num_open, (1024, 1024)) == []
    (line,) = said(1025 - num_open, (1024, 1024))
    assert line.endswith("(ulimit -n 1025, for which the hard limit, 1024, has to be raised first)")
