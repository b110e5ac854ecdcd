"""From autograd to sums.

In reading order; each imports from those above it:

    hooks             the hook of a parameter
    lockstep          whether all ranks are at the same place of the training loop
    norm_groups       over whom to sum the norm of a whole model
    norms             norms and clipping, where each rank holds a slice
    untrained         gradients of parameters that no optimizer trains
    sharded_tensor    `ShardedGradient`: what `param.grad` is in stages 1 and 2
    tensor_operators  torch's operators on it
    sharded_view      all of those of one model
    reducer           `GradientReducer`: hooks fill buckets, and full buckets travel while backward goes on
"""
