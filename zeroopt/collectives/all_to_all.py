"""Slices go straight to the ranks that own them, which sum them: on a device, with the bits and the precision of the CPU transports.

A backend's own reduce-scatter (NCCL's) sums in the dtype that travels and in an order of its own, which depends on the number of
ranks, their places and the size of the bucket. Here an all-to-all moves the slices, and one kernel sums them: in the order of ranks,
as the tree of `ops.reduce`, in float32. So 16-bit gradients are rounded once, not in every hop, and results are the same for all
stages, bucket sizes, transports and runs.

**What it costs**, of a bucket of B bytes and N ranks:

    on the links   B (N-1)/N in and as much out at each rank, as with a ring's reduce-scatter
    in memory      the kernel reads B and writes B/N; what has been received takes B, once for all buckets
    between hosts  a ring crosses a host's links once, whatever the number of its ranks: B. Here each of its n ranks has to send
                   to all ranks elsewhere: n B (N-n)/N

Within one host, whose GPUs are linked by NVLink or share PCI Express, it is as fast, but for the kernel's B / (memory bandwidth),
which runs beside backward: "auto" takes it there. Over several hosts with n ranks each it sends up to n times as much, and
"auto" goes host by host (`hierarchy`), or leaves sums to the backend.
"""

from __future__ import annotations

from .site import Site
from .torch_native import TorchTransport


class AllToAllTransport(TorchTransport):
    """Reduces by an all-to-all of slices, and gathers by the backend's all-gather."""

    name = "all_to_all"
    sums_here = True

    @classmethod
    def serves(cls, site: Site) -> bool:
        return site.device.type != "cpu" and len(site.hosts) == 1

    @classmethod
    def staging_bytes(cls, num_bytes: int, item_bytes: int, num_slices: int, num_hosts: int) -> int:
        return num_bytes  # what has been received
