"""Transports: how a bucket's slices get from rank to rank."""

from .base import PendingCollective, Transport, gather_scalar
from .select import check_transport, connect_transport

__all__ = ["PendingCollective", "Transport", "check_transport", "connect_transport", "gather_scalar"]
