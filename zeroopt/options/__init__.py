"""What a user asked for, checked and frozen.

In reading order; each imports from those above it:

    precision  in what precision parameters, gradients and state are kept; masters taken apart and joined
    config     `Config`, the options of `zeroopt.wrap`
"""
