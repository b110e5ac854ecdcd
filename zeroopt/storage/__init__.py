"""The memory of buckets.

In reading order; each imports from those above it:

    broadcast       tensors of one rank to all others, in few messages
    bucket          `Bucket`: parameters side by side in one flat buffer, with what completes them
    assembling      a whole tensor from the pieces that ranks have
    buffer_pool     `BufferPool`: full gradient buffers that buckets borrow
    gradient_store  `GradientStore`: the gradients of a bucket
"""
