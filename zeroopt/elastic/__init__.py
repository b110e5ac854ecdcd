"""Going on after ranks were killed, from memory instead of a disk. `import zeroopt.elastic` to use it.

In reading order; each imports from those above it:

    place       where in a host's memory a job's copies are
    slots       memory that outlives a process, one half of which is always whole
    contents    what a rank copies, and where it lies in a slot
    alike       what of it all ranks have
    copier      copies it
    stored      copies of all ranks, as a checkpoint that can be loaded
    finding     which copies there are on all hosts
    neighbours  copies on another host
    guard       `Guard`
"""

from .guard import Guard

__all__ = ["Guard"]
