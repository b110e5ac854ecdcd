"""Transports: how a bucket's slices get from rank to rank."""

from .base import PendingCollective, Transport, gather_scalar
from .failure import ADVICE, named_failures
from .select import check_transport, connect_transport

__all__ = [
    "ADVICE",
    "PendingCollective",
    "Transport",
    "check_transport",
    "connect_transport",
    "gather_scalar",
    "named_failures",
]
