"""Parameters and buffers from a step to the next forward.

In reading order; each imports from those above it:

    buffers  batch norm statistics and the like, which follow those of one rank
    gathers  updated parameters on their way, and the guard that lets nobody read them too early
"""
