"""Which element lies where, and who owns it. Nothing here reads or writes a tensor's elements.

In reading order; each imports from those above it:

    regions    a range of a flattened tensor as boxes of its own shape
    params     `ManagedParam`: a parameter, and its place in a bucket
    dtensors   parameters of which a rank holds one local tensor (tensor parallelism)
    agreement  ranks compare what they are about to do, before anything is changed
    redistribution  what travels between slices and the ranges that ranks step
    ownership  which elements of every bucket this rank steps, and which it writes
    buckets    which parameters share a bucket, and in what order
    claims     which wrapped model trains a parameter
"""
