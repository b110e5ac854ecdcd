"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import settings
from worker_pool import RunOnRanks

settings.register_profile("any machine, however busy", deadline=None)
settings.load_profile("any machine, however busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on several ranks, which `make test-quick` leaves out."""
    for item in items:
        if "run_on_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("ranks")


@pytest.fixture(scope="session")
def run_on_ranks() -> Iterator[RunOnRanks]:
    """`run_on_ranks(world_size, function, *args, **kwargs)`: values by rank, from workers that tests share."""
    with closing(RunOnRanks()) as run:
        yield run
