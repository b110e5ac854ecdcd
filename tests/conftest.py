"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from worker_pool import RunOnRanks


@pytest.fixture(scope="session")
def run_on_ranks() -> Iterator[RunOnRanks]:
    """`run_on_ranks(world_size, function, *args, **kwargs)`: values by rank, from workers that tests share."""
    with closing(RunOnRanks()) as run:
        yield run
