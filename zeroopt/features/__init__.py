"""What a user may switch on.

In reading order; each imports from those above it:

    join         ranks with different numbers of batches
    audit        `check_every`: finite gradients, equal parameters
    averaging    `average_every`: ranks that train alone, and average
    fragments    sets of buckets that have their outer steps in turn
    outer_optimizer    any torch optimizer, of flat parameters
    exchange_buffers   memory in which buckets travel between ranks that average
    outer_wires  in what form outer gradients and steps travel
    anchor       what the ranks last had in common of a bucket, and how it gets its outer step
    outer_bytes  what outer steps take
    outer_steps  `outer_optimizer`: instead of the mean, the step of an optimizer (DiLoCo)
    micro_batches    `micro_batches`: gradients of a step are summed in one tree over micro-batches and ranks
    clipping     by the norm of all gradients
    grad_scaler  steps through a GradScaler: all ranks leave out the same ones
    captures     CUDA graphs, for which parameters stay where they are
    foresight    the order in which gradients will arrive, as the first forward tells it
    replanning   buckets in that order, and in the one in which they have arrived
    growth       parameters that come and go: unfrozen ones, further groups, edited groups
    used_in_bucket     which parameters of a bucket had a gradient on any rank, told while it travels
    step_in_backward   each bucket is stepped as soon as its sum is there
    of_model     what takes part in the steps of all optimizers of a model
"""
