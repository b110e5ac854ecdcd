"""What a user may switch on.

In reading order; each imports from those above it:

    join         ranks with different numbers of batches
    audit        `check_every`: finite gradients, equal parameters
    averaging    `average_every`: ranks that train alone, and average
    outer        `outer_optimizer`: instead of the mean, the step of an optimizer (DiLoCo)
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
