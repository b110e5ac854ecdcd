"""The process with pretend devices, for all tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from .process import PretendProcess


@pytest.fixture(scope="session")
def on_pretend_cuda() -> Iterator[PretendProcess]:
    """`on_pretend_cuda(function, *args)`: what the function returns in the process that has pretend devices."""
    with closing(PretendProcess()) as process:
        yield process
