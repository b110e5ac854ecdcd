"""Outer steps: ranks, or groups of them, that train alone step what they had in common by an optimizer of its own (DiLoCo).

In reading order; each imports from those above it:

    fragments         sets of buckets that have their outer steps in turn
    optimizer         any torch optimizer, of flat parameters
    exchange_buffers  memory in which buckets travel between ranks that average
    wires             in what form outer gradients and steps travel
    anchor            what the ranks last had in common of a bucket, and how it gets its outer step
    memory            what outer steps take
    steps             `outer_optimizer`: instead of the mean, the step of that
"""
