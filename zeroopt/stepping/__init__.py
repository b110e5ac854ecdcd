"""One step on what a rank owns.

In reading order; each imports from those above it:

    rules          which optimizers have a fused kernel, and how their options and state map to it
    step_counts    counts of steps that are beyond what a float32 can be
    segments       state of many segments, stepped in one call
    bucket_kernel  `BucketKernel`: some buckets by a fused kernel
    grouping       which of them in one call
    paged_state    where the state lies that an optimizer's own step makes
    part_state     their state, of parameters that are stepped part by part
    parts          those parameters
    plain          by the optimizer's own step
    stepper        `ShardStepper`: chooses for each bucket
"""
