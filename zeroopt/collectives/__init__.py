"""Transports: how a bucket's slices get from rank to rank.

In reading order; each imports from those above it:

    failure        how failed collectives are told
    group_timeout  how long ranks wait for one another
    hosts          which ranks can share memory
    shared_memory  memory that the ranks of one host share
    turnout        which ranks still train
    lone           what stands for the process group of a process that trains by itself
    base           `Transport`: the collectives that ZeRO needs, on flat buckets
    single         a group of one
    shm            one host: shared memory
    pairwise       messages between pairs, for Gloo
    hybrid         several hosts: shared memory within, messages between
    torch_native   torch's own reduce-scatter and all-gather, for NCCL
    select         picks one of them
"""

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
