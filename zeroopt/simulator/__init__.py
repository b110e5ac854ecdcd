"""How long a step will take, and for what it waits: a run of the real plan through time, on a machine that is described by a few numbers.

In reading order; each imports from those above it:

    machine       `Machine`: what a machine's parts do in a second, from a file
    events        `Clock`: what happens when, and who waits for whom
    collectives   what a collective takes, by transport: one table
    stragglers    the slowest of many ranks
    workload      a model, bucket by bucket: what is computed, and what travels
    measure       the numbers of the machine at hand
    travelling    a collective on its way
    training      one rank's steps, in the order in which zeroopt takes them
    peers         the same by DistributedDataParallel and FSDP2
    simulate      `simulate`: a model, a machine and options, and what comes of them
    command       the command line
"""

from .machine import Machine
from .simulate import Simulated, simulate

__all__ = ["Machine", "Simulated", "simulate"]
