"""What training will hold, before there is a model in memory, or a second rank.

In reading order; each imports from those above it:

    live_bytes      `LiveBytes`: bytes of tensors that are alive while code runs
    activations     what one forward and backward hold
    rehearsal       `Rehearsal`: a model wrapped on the meta device, as one rank of many has it
    waiting_gradients  those that lie apart until their bucket has a buffer or, on a device, is complete
    own_step        what an optimizer's own step takes for itself
    runtime         what libraries and allocators take
    phases          what is held in each phase of a training
    tiers           tiers of precision by name
    estimator       one choice of options after the other
    advice          what makes it fit
    report          tables and JSON
    estimate        `estimate_memory`
    transformer     a transformer of so many parameters
    command         the command line
"""

from .estimate import MemoryEstimate, estimate_memory

__all__ = ["MemoryEstimate", "estimate_memory"]
