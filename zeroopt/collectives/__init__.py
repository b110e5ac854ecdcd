"""Transports: how a bucket's slices get from rank to rank."""

from .base import PendingCollective, Transport
from .select import select_transport

__all__ = ["PendingCollective", "Transport", "select_transport"]
