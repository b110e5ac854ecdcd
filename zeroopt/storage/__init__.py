"""The memory of buckets.

In reading order; each imports from those above it:

    segment         `Segment`: the part of a parameter that this rank steps
    masters         `Master`: the exact values of what this rank steps, whatever the model has of them
    bucket          `Bucket`: parameters side by side in one flat buffer
    assembling      a whole tensor from the pieces that ranks have
    stripe          `Stripe`: a part of a bucket that travels by itself
    buffer_pool     `BufferPool`: full gradient buffers that buckets borrow
    slice_sums      memory for sums of slices on their way to those who step them
    square_table    sums of squares of several buckets in one launch
    gradient_store  `GradientStore`: the gradients of a bucket
    factors         what sums have yet to be multiplied by
    own_shard       `OwnShard`: what a step works on
"""
