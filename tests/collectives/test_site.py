"""What a site says of its backend and hosts is what the process group and its ranks say."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from zeroopt.collectives import site as sites
from zeroopt.collectives.lone import lone_group
from zeroopt.collectives.site import Site


def site_of(config: str, device: str, monkeypatch: pytest.MonkeyPatch) -> Site:
    """One whose group has these backends, as torch would describe them."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(dist, "get_backend", lambda group: "undefined")
    return Site(dist.ProcessGroup(0, 2), torch.device(device))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("config", "device", "backend", "has_gloo_on_cpu"),
    [
        ("cpu:gloo,cuda:nccl", "cpu", "gloo", True),
        ("cpu:gloo,cuda:nccl", "cuda", "nccl", False),
        ("cpu:gloo,cuda:gloo", "cuda", "gloo", False),
        ("cpu:mpi", "cpu", "mpi", False),
        ("cuda:nccl", "cpu", "undefined", False),
        ("fake", "cpu", "undefined", False),
        ("", "cpu", "undefined", False),
    ],
)
def test_each_device_has_its_backend(
    config: str, device: str, backend: str, has_gloo_on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_of(config, device, monkeypatch)
    assert site.backend == backend
    assert site.has_gloo_on_cpu is has_gloo_on_cpu


def test_hosts_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time, other ranks may not be there to answer."""
    asked = []
    answer = [[0, 1], [2]]

    def ranks_by_host(control: sites.ControlGroup) -> list[list[int]]:
        asked.append(control.group)
        return answer

    monkeypatch.setattr(sites, "ranks_by_host", ranks_by_host)
    group = dist.ProcessGroup(0, 3)  # type: ignore[call-arg]
    site = Site(group, torch.device("cpu"))
    assert asked == []
    assert site.hosts == site.hosts == answer
    assert asked == [group]


def test_a_process_alone_is_on_one_host() -> None:
    assert Site(lone_group(), torch.device("cpu")).hosts == [[0]]
