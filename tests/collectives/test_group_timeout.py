"""How long ranks wait is what the group's backend says, or torch's default where it says nothing."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from zeroopt.collectives.group_timeout import group_timeout


class Group:
    """A process group as far as it tells of its backends, by the kind of device."""

    def __init__(self, **backends: Any) -> None:
        self._backends = backends

    def _get_backend(self, device: torch.device) -> Any:
        return self._backends[device.type]


def timeout_of(group: Any, device: str = "cpu") -> timedelta:
    return group_timeout(group, torch.device(device))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without Gloo")
def test_gloo_tells_what_the_group_was_made_with() -> None:
    timeout = timedelta(seconds=7)
    gloo = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timeout)
    assert timeout_of(Group(cpu=gloo)) == timeout != default_pg_timeout


def test_each_device_has_the_timeout_of_its_backend() -> None:
    seconds = {"cpu": timedelta(seconds=1), "cuda": timedelta(seconds=2)}
    group = Group(**{kind: SimpleNamespace(options=SimpleNamespace(_timeout=s)) for kind, s in seconds.items()})
    assert {kind: timeout_of(group, kind) for kind in seconds} == seconds


@pytest.mark.parametrize("backend", [SimpleNamespace(), SimpleNamespace(options=None)])
def test_a_backend_that_does_not_tell_has_torchs_default(backend: Any) -> None:
    assert timeout_of(Group(cpu=backend)) == default_pg_timeout
