"""Bytes that this process sends over TCP, as the kernel counts them for each of its connections.

Unlike the counters of a network device these know nothing of other programs. Collectives that go through shared memory, or
from device to device, send nothing here.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys

BYTES_SENT = 200  # its place in struct tcp_info, since Linux 4.19 (linux/tcp.h)


def sent_bytes() -> int | None:
    """By all connections that are open now; None where the kernel does not say."""
    if sys.platform != "linux":
        return None
    sent = [bytes_of(int(descriptor)) for descriptor in os.listdir("/proc/self/fd")]
    return sum(sent)


def bytes_of(descriptor: int) -> int:
    """Sent through a descriptor; 0 for what is no TCP connection."""
    try:
        # A copy of what is no socket would stay open, or, closed, give up the locks of this process on that file.
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return 0
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
                return 0
            facts = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_SENT + 8)
    except OSError:  # closed meanwhile
        return 0
    (sent,) = struct.unpack_from("Q", facts, BYTES_SENT) if len(facts) >= BYTES_SENT + 8 else (0,)
    return int(sent)
