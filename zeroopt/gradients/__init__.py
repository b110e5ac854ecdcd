"""From autograd to sums.

In reading order; each imports from those above it:

    counting          gradients that only have to be counted
    hooks             the hook of a parameter
    step_guard        a step that was broken off
    lockstep          whether all ranks are at the same place of the training loop
    norm_groups       over whom to sum the norm of a whole model
    norms             norms and clipping, where each rank holds a slice
    untrained         gradients of parameters that no optimizer trains
    exact_norms       norms whose bits do not depend on how elements are shared
    tree_sum          `TreeSum`: micro-batches of one rank, summed as ranks are
    overflow          whether any rank has found a gradient that is not finite
    view              `GradientView`: what `param.grad` shows
    whole_view        in stage 0
    sharded_tensor    `ShardedGradient`: what `param.grad` is in stages 1 and 2
    tensor_operators  torch's operators on it
    sharded_view      in stages 1 and 2: all of those of one model
    used              which parameters had a gradient on any rank
    packing_streams   on which streams of a device they come
    backward_end      when the outermost of backward passes within one another is through
    filling           gradients on their way into the full buffers of their buckets
    in_flight         full buffers from when they travel until nobody reads them
    residuals         what codes have left out of gradients, by parameter
    reducer           `GradientReducer`: hooks fill buckets, and full buckets travel while backward goes on
"""
