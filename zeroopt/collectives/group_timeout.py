"""How long the ranks of a process group wait for one another."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout


def group_timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """The group's timeout as it is now, for it may be set anew when all ranks have connected; torch's default where a backend does not tell."""
    try:
        options = getattr(group._get_backend(device), "options", None)
    except RuntimeError:  # a group that is its own backend
        return default_pg_timeout
    timeout = getattr(options, "_timeout", default_pg_timeout)
    assert isinstance(timeout, timedelta)
    return timeout
