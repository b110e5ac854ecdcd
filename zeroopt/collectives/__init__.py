"""How ranks reach each other: buckets by a transport, all else by a control group.

In reading order; each imports from those above it:

    failure            how failed collectives are told
    group_timeout      how long ranks wait for one another
    lone               what stands for the process group of a process that trains by itself
    backends           which backends a process group has
    lost               which rank is lost, where something has failed for want of one
    messages           `Messages`: what a backend has been told, until it is through
    patience           waits that signals end
    pending            `PendingCollective`: what has been started and has to be finished
    flat               tensors side by side, so that they travel as one
    renamed            collectives of flat tensors, by one name
    pickled            what ranks send each other pickled lies on the CPU
    control            `ControlGroup`: the small things that ranks tell each other
    numbering          numbers of what is made over a group
    exchange           `Exchange`: pieces of a bucket, from the ranks that have them to those that need them
    descriptors        whether there are enough for so many connections
    group_names        what torch calls groups that only their own ranks make
    second_group       another group of the same ranks, for another thread
    merging            what different ranks know, put together
    hosts              which ranks can share memory
    site               where a transport is to work: group, device, hosts
    shared_memory      memory that the ranks of one host share
    arena              that memory, cut into buffers
    turnout            which ranks still train
    residual           what codes have left out of gradients, to be sent later
    rounding           by which random numbers codes are rounded
    wire               `Wire`: in what form gradients travel
    compression        as 8- or 4-bit codes
    base               `Transport`: the collectives that ZeRO needs, on flat buckets
    single             a group of one
    shm                one host: shared memory
    pairwise           messages between pairs, for Gloo
    driver             a thread that carries collectives on
    rounds             who sends whom what, up and down a tree of ranks
    tree               messages in rounds, for many ranks
    hybrid             several hosts: shared memory within, messages between
    comm_stream        the stream of a device on which collectives run
    scratch            memory for what they receive
    torch_native       torch's own reduce-scatter and all-gather, for NCCL
    all_to_all         slices exchanged by the backend, and summed here
    levels             a node, then nodes: which ranks exchange on which level
    subgroups          process groups of some ranks of a group
    hierarchy          the same exchange, level by level
    select             picks one of them, by name or for a group
    replicated         groups of ranks that share a state, and sums across them
    registered_memory  the same, with buckets in memory that the backend has registered
"""

from .base import Transport
from .control import ControlGroup
from .hierarchy import hierarchy
from .pending import PendingCollective
from .registered_memory import registered
from .select import TRANSPORTS, TransportFactory
from .wire import Wire

__all__ = [
    "TRANSPORTS",
    "ControlGroup",
    "PendingCollective",
    "Transport",
    "TransportFactory",
    "Wire",
    "hierarchy",
    "registered",
]
