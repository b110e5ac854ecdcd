"""Fixtures for all tests."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from contextlib import closing

import pytest
from hypothesis import settings
from worker_pool import RunOnRanks

settings.register_profile("any machine, however busy", deadline=None)
settings.register_profile("few", deadline=None, max_examples=10)  # of `make matrix`
settings.register_profile("deep", deadline=None, max_examples=5000)  # of `make fuzz`
settings.load_profile("any machine, however busy")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is collected stays to the end: nobody looks through it for garbage, neither meanwhile nor in tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on several ranks, which `make test-quick` leaves out, and bring files with slow tests to the front: the one that
    `make test` comes to last runs alone.
    """
    for item in items:
        if "run_on_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("ranks")
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


@pytest.fixture(scope="session")
def run_frameworks_on_ranks() -> Iterator[RunOnRanks]:
    """`run_on_ranks` of tests of what people train in, whose workers find that imported: it takes longer than most of these tests."""
    with closing(RunOnRanks(["trainers", "accelerators", "lightning_runs", "lightning.pytorch"])) as run:
        yield run


@pytest.fixture(scope="session")
def run_on_ranks() -> Iterator[RunOnRanks]:
    """`run_on_ranks(world_size, function, *args, **kwargs)`: values by rank, from workers that tests share."""
    with closing(RunOnRanks()) as run:
        yield run
