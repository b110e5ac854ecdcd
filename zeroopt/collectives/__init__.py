"""Transports: how a bucket's slices get from rank to rank."""

from .base import PendingCollective, Transport, abandon
from .select import select_transport

__all__ = ["PendingCollective", "Transport", "abandon", "select_transport"]
