"""Workers of these tests find imported what people train in."""

from __future__ import annotations

import pytest
from worker_pool import RunOnRanks


@pytest.fixture(scope="session")
def run_on_ranks(run_frameworks_on_ranks: RunOnRanks) -> RunOnRanks:
    return run_frameworks_on_ranks
