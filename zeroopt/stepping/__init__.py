"""One step on what a rank owns.

In reading order; each imports from those above it:

    rules     which optimizers have a fused kernel, and how their options and state map to it
    segments  state of many segments, stepped in one call
    stepper   `ShardStepper`: by the fused kernel, or by the optimizer's own step
"""
