"""Which ranks of a group are on one host, in the sense that they can share memory."""

from __future__ import annotations

import hashlib
import os
import platform
import struct
from pathlib import Path

from .control import ControlGroup


def host_identity() -> str:
    """The same text in two processes only if they run under one kernel and see each other in /proc.

    A host name would not do: containers on one machine may have different ones, and machines made from one image the same.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: shared memory will be refused anyway
        return platform.node()


def ranks_by_host(control: ControlGroup) -> list[list[int]]:
    """The group's ranks, host by host, in the order of each host's first rank. Collective."""
    digest = struct.unpack("<4q", hashlib.sha256(host_identity().encode()).digest())
    hosts: dict[tuple[int, ...], list[int]] = {}
    for rank, identity in enumerate(control.numbers(digest, "finding ranks that share a host")):
        hosts.setdefault(tuple(identity), []).append(rank)
    return list(hosts.values())
