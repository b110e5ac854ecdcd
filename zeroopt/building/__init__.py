"""A model on the meta device gets its values where they will lie: in buckets, one module after the other.

In reading order:

    unmade     what of a model is on the meta device, and how it becomes tensors without memory
    unchanged  a model through which something runs is then as it was before
    call       one piece of the building
    saved      values that were saved are read
    functions  what gives modules their values, and in which order
    trial      the functions run on the meta device: which of them makes what
    building   the functions run for good
"""
