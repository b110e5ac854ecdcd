"""Parameters and buffers from a step to the next forward.

In reading order; each imports from those above it:

    buffers   batch norm statistics and the like, which follow those of one rank
    compiled  what torch.compile has made of a model, and who comes before it
    arriving  parameters that are on their way, and who waits for them
    differences  updated parameters as codes of what has changed
    gathers   one all-gather a bucket
    first_uses  in which order the first forward comes to them
"""
