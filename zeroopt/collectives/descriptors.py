"""Whether this process may open as many descriptors as there are ranks to connect to."""

from __future__ import annotations

import logging
import os
import resource

_log = logging.getLogger("zeroopt")


def warn_of_few_descriptors(num_needed: int, what: str) -> None:
    """Say in the log when so many further connections are more than the process may have open, and how to raise that.

    Args:
        what: needs them, for the message.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd")) - 1 if os.path.isdir("/proc/self/fd") else 0  # but for the list's own
    if limit != resource.RLIM_INFINITY and num_open + num_needed > limit:
        advice = f"ulimit -n {num_open + num_needed}"
        if most != resource.RLIM_INFINITY and num_open + num_needed > most:
            advice += f", for which the hard limit, {most}, has to be raised first"
        _log.warning(
            "%s needs %d descriptors; this process has %d open and may have %d: start it with more (%s)",
            *(what, num_needed, num_open, limit, advice),
        )
