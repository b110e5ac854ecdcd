"""Which backend serves which device is what torch says of the process group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from zeroopt.collectives import ControlGroup
from zeroopt.collectives.backends import backends_of
from zeroopt.collectives.lone import lone_group


@pytest.mark.parametrize(
    ("asked", "served", "device"),
    [
        ("gloo", {"cpu": "gloo", "cuda": "gloo"}, "cpu"),
        ("nccl", {"cuda": "nccl"}, "cuda"),
        ("cuda:nccl", {"cuda": "nccl"}, "cuda"),
        ("cpu:gloo,cuda:nccl", {"cpu": "gloo", "cuda": "nccl"}, "cpu"),
    ],
)
def test_ranks_compare_where_a_backend_serves(
    asked: str, served: dict[str, str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`asked` is what `init_process_group` is given; torch makes the configuration of it."""
    config = dist.distributed_c10d.BackendConfig(dist.Backend(asked))
    monkeypatch.setattr(dist, "get_backend_config", lambda group: str(config))
    group = dist.ProcessGroup(0, 2)  # type: ignore[call-arg]
    assert backends_of(group).items() >= served.items()
    assert ControlGroup(group).device == torch.device(device)


def test_a_process_alone_has_no_backend() -> None:
    assert backends_of(lone_group()) == {}
    assert ControlGroup(lone_group()).device == torch.device("cpu")
