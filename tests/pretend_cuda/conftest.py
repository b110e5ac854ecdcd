"""The process with pretend devices, for all tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from .process import PretendProcess

TIMEOUT_S = 900  # of a test: the first one compiles


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of all tests: those of other folders are left as they are."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def on_pretend_cuda() -> Iterator[PretendProcess]:
    """`on_pretend_cuda(function, *args)`: what the function returns in the process that has pretend devices."""
    with closing(PretendProcess()) as process:
        yield process
