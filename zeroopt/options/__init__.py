"""What a user asked for, checked and frozen.

In reading order; each imports from those above it:

    checks     what several options are checked for
    precision  in what precision parameters, gradients and state are kept; masters taken apart and joined
    splits     of what parts parameters consist that hold several matrices
    placement  what a rank keeps of a bucket: in what the stages differ
    outer      what `average_every` does beyond taking a mean
    config     `Config`, the options of `zeroopt.wrap`
"""
